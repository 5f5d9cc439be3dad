"""Hostile grammars and schemas."""

from __future__ import annotations

import time

import pytest

from llmkit.backend.gbnf import to_lark
from llmkit.errors import InvalidRequestError
from llmkit.protocol import SamplingParams
from llmkit.protocol.schema import normalized


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#"}, "no finite text"),
        (
            {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}},
            "no finite text",
        ),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no finite text"),
        (
            {
                "allOf": [{"$ref": "#/$defs/x"}],
                "$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}},
            },
            "no finite text",
        ),
        ({"type": "array", "uniqueItems": True}, "uniqueItems at #"),
        (
            {"properties": {"a": {"items": [{"not": {"type": "null"}}]}}},
            "not at #/properties/a/items/0",
        ),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if at #"),
        ({"$ref": "https://example.org/schema"}, r"\$ref at #"),
        ({"properties": {"a": {"type": "strange"}}}, "type at #/properties/a"),
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames at #"),
        (False, "a schema is an object"),
        ([], "a schema is an object"),
        ({"properties": {"a": 5}}, "#/properties/a"),
        ({"minimum": 5, "maximum": 4}, "minimum at #"),
    ],
)
def test_schemas_that_cannot_be_held(schema: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        normalized(schema)


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        ({"type": "string", "format": "uuid4", "title": "x"}, {"type": "string", "title": "x"}),
        (
            {"type": "object", "propertyNames": {"type": "string"}, "minProperties": 0},
            {"type": "object"},
        ),
        ({"type": "array", "uniqueItems": False, "minItems": 0}, {"type": "array"}),
        (
            {"type": "integer", "uniqueItems": True, "minimum": 0, "exclusiveMinimum": True},
            {"type": "integer", "exclusiveMinimum": 0},
        ),
        (
            {"type": "integer", "maximum": 9, "exclusiveMaximum": False},
            {"type": "integer", "maximum": 9},
        ),
        (
            {"type": "integer", "minimum": -(2**63)},
            {"type": "integer", "minimum": -9223372036854774784},
        ),
        ({"type": "number", "maximum": 1.7976931348623157e308}, {"type": "number"}),
        (
            {
                "not": False,
                "then": {"type": "null"},
                "$schema": "http://json-schema.org/draft-07/schema#",
            },
            {},
        ),
        ({"type": "string", "maxLength": 8.0}, {"type": "string", "maxLength": 8}),
        (
            {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
            {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        ),
        ({"const": {"not": 1, "uniqueItems": True}}, {"const": {"not": 1, "uniqueItems": True}}),
        (
            {"properties": {"not": {"type": "string"}, "if": {}}},
            {"properties": {"not": {"type": "string"}, "if": {}}},
        ),
    ],
)
def test_keywords_that_ask_nothing_are_no_errors(schema: object, held: object) -> None:
    assert normalized(schema) == held


def test_a_long_chain_of_references_is_read_soon() -> None:
    chain = {
        f"d{i}": {
            "type": "object",
            "properties": {"next": {"$ref": f"#/$defs/d{i + 1}"}},
            "required": ["next"],
        }
        for i in range(2000)
    }
    began = time.thread_time()
    assert normalized({"$ref": "#/$defs/d0", "$defs": {**chain, "d2000": {"type": "null"}}})
    with pytest.raises(InvalidRequestError):
        normalized({"$ref": "#/$defs/d0", "$defs": {**chain, "d2000": {"$ref": "#/$defs/d0"}}})
    assert time.thread_time() - began < 30


GBNF = [
    (
        "escapes",
        'root ::= "caf\\u00e9" | "\\x41" | "\\U0001F600"',
        ["café", "A", "😀"],
        ["cafe", "B"],
    ),
    (
        "classes",
        "root ::= [\\U0001F600-\\U0001F64F] [^a-c] [a&&b]",
        ["😀x&", "😁d" + "a"],
        ["ax&", "😀aa"],
    ),
    (
        "names",
        (
            'root ::= start 1x foo-bar Foo foo\nstart ::= "s"\n1x ::= "1"\nfoo-bar ::= "-"\n'
            'Foo ::= "F"\nfoo ::= "f"'
        ),
        ["s1-Ff"],
        ["s1-ff"],
    ),
    ("not greedy", 'root ::= w "z"\nw ::= [a-z]+', ["abz"], ["ab", "z"]),
    ("words that share beginnings", 'root ::= ("a" | "ab") "b"', ["ab", "abb"], ["b"]),
    (
        "repeats",
        'root ::= "a"{2}{3} "b"? "c"{0} "d"{1,2} ("e" | "f"){2,}',
        ["aaaaaadee", "aaaaaabddef"],
        ["aaaaadee", "aaaaaade"],
    ),
    ("any", "root ::= . .", ["\n\n", "é😀"], ["a"]),
    ("recursion", 'root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "()"]),
    ("left recursion", 'root ::= root "a" | "b"', ["b", "baa"], ["a"]),
    (
        "comments and lines",
        '# one\nroot ::= ( # two\n "a" |\n "b"\n)+ # three\r\n',
        ["abba"],
        ["c"],
    ),
    ("dead cases", 'root ::= "a" | dead\ndead ::= "b" dead', ["a"], ["b"]),
]


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "fits", "others"), [case[1:] for case in GBNF], ids=[case[0] for case in GBNF]
)
def test_gbnf_is_read_as_llama_cpp_does(
    engine, text: str, fits: list[str], others: list[str]
) -> None:  # type: ignore[no-untyped-def]
    from llmkit.protocol import Grammar

    def accepts(said: str) -> bool:
        constraint = engine._grammars.compile(Grammar("gbnf", text))
        for token in engine._vocab.tokenize(said, add_special=False):
            if not constraint.allows(token):
                return False
            constraint.accept(token)
        return bool(constraint.allows(engine._vocab.eos))

    assert all(map(accepts, fits)) and not any(map(accepts, others))


@pytest.mark.parametrize(
    "text",
    [
        "root ::= root",
        'root ::= "a" root',
        "root ::= x\nx ::= y\ny ::= x",
        'x ::= "a"',
        "root ::= [",
        'root ::= "a',
        "root ::= (a",
        "root ::= b",
    ],
)
def test_gbnf_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        to_lark(text)


@pytest.mark.model
def test_a_grammar_that_costs_too_much_is_refused(engine) -> None:  # type: ignore[no-untyped-def]
    from llmkit.protocol import GenerationRequest, Grammar

    for kind, text in (
        ("gbnf", "root ::= " + " | ".join(f'"w{i:05}" root | "w{i:05}"' for i in range(3000))),
        ("regex", "(a?)" * 20_000),
        ("lark", "start: " + " | ".join(f'"w{i}" x' for i in range(4000)) + '\nx: "a"'),
    ):
        began = time.monotonic()
        with pytest.raises(InvalidRequestError):
            engine.submit(
                GenerationRequest("r", SamplingParams(grammar=Grammar(kind, text)), prompt="a")
            )
        assert time.monotonic() - began < 60
    many = Grammar("gbnf", "root ::= " + " | ".join(f'"w{i:05}"' for i in range(6000)))
    text = (
        engine.submit(
            GenerationRequest("r2", SamplingParams(grammar=many, max_tokens=12), prompt="a")
        )
        .result(300)
        .text
    )
    assert text.startswith("w") and len(text) == 6, "thousands of plain texts are fine"
