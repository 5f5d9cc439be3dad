"""Schemas and grammars on the real embedded model, also those that an attacker sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

import llmkit
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Grammar

pytestmark = pytest.mark.model


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    yield handle
    handle.unload()


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_schema_is_kept(llm: llmkit.LLM, temperature: float) -> None:
    many = llm.generate(
        ["A person as JSON:"] * 4,
        max_tokens=120,
        temperature=temperature,
        seed=3,
        grammar=Grammar("json_schema", json.dumps(PERSON)),
    )
    for completion in many:
        jsonschema.validate(json.loads(completion.text), PERSON)
        assert completion.finish_reason.value == "stop"


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[0-9]{4}-[0-9]{2}", r"\d{4}-\d{2}"),
        ("choice", '["yes", "no", "may be \\"so\\""]', r"yes|no|may be \"so\""),
        ("gbnf", 'root ::= "a" [0-9] [0-9]? "b"', r"a\d{1,2}b"),
        ("lark", 'start: "x" /[0-9]{3}/ "y"', r"x\d{3}y"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammars_of_every_kind(
    llm: llmkit.LLM, kind: str, text: str, pattern: str, temperature: float
) -> None:
    import re

    completion = llm.generate(
        "Well: ", max_tokens=60, temperature=temperature, seed=3, grammar=Grammar(kind, text)
    )
    assert re.fullmatch(pattern, completion.text), completion


def test_a_grammar_that_is_none_says_why(llm: llmkit.LLM) -> None:
    bad = {
        "regex": "[(",
        "json_schema": '{"type": "nonsense"}',
        "gbnf": "root = x",
        "lark": "start: bla",
        "choice": "[]",
    }
    for kind, text in [*bad.items(), ("json_schema", "{")]:
        with pytest.raises(InvalidRequestError, match=kind):
            llm.generate("x", grammar=Grammar(kind, text))
    with pytest.raises(InvalidRequestError, match="kinds are"):
        Grammar("nonsense", "x")
    assert llm.generate("The", max_tokens=2).usage.completion_tokens == 2


def test_a_grammar_with_penalties_stops_and_logprobs(llm: llmkit.LLM) -> None:
    grammar = Grammar("json_schema", json.dumps(PERSON))
    completion = llm.generate(
        "JSON:", max_tokens=100, temperature=0, grammar=grammar, repetition_penalty=1.2, logprobs=2
    )
    jsonschema.validate(json.loads(completion.text), PERSON)
    assert len(completion.logprobs) == completion.usage.completion_tokens and all(
        np.isfinite(e.logprob) for e in completion.logprobs
    )  # type: ignore[arg-type]


def chain(kind: str, links: int) -> str:
    if kind == "json_schema":
        names: dict[str, Any] = {
            f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(links)
        }
        return json.dumps(
            {"$ref": "#/$defs/a0", "$defs": {**names, f"a{links}": {"type": "integer"}}}
        )
    if kind == "lark":
        return (
            "start: T0\n" + "".join(f"T{i}: T{i + 1}\n" for i in range(links)) + f'T{links}: "x"\n'
        )
    return (
        "root ::= r0\n"
        + "".join(f"r{i} ::= r{i + 1}\n" for i in range(links))
        + f'r{links} ::= "x"\n'
    )


@pytest.mark.parametrize(("kind", "links"), [("json_schema", 1500), ("lark", 7000), ("gbnf", 6000)])
def test_long_chains_of_rules_do_not_overflow_the_stack(
    llm: llmkit.LLM, kind: str, links: int
) -> None:
    """They ended the process once. Compiled or refused, the model lives."""
    try:
        llm.generate("x", max_tokens=2, grammar=Grammar(kind, chain(kind, links)))
    except InvalidRequestError as error:
        assert "grammar" in str(error)
    assert llm.generate("The", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("text", ["((a{1000}){1000}){1000}", "(a|b|c|aa|bb|cc|ab|bc|ca){1,400}x"])
def test_a_slow_mask_hurts_nobody_else(llm: llmkit.LLM, text: str) -> None:
    other = llm.stream("Once upon a time", max_tokens=30, ignore_eos=True)
    try:
        llm.generate("aaa", max_tokens=6, temperature=1.0, grammar=Grammar("regex", text))
    except (InvalidRequestError, llmkit.EngineError) as error:
        assert "grammar" in str(error)
    assert other.result(300).usage.completion_tokens == 30


def test_the_same_grammar_is_compiled_once(llm: llmkit.LLM) -> None:
    grammar = Grammar("choice", json.dumps([f"word{i}" for i in range(3000)]))
    texts = {
        c.text for c in llm.generate(["Say:"] * 20, max_tokens=8, temperature=1.0, grammar=grammar)
    }
    assert all(t.startswith("word") for t in texts) and len(llm._client._grammars._known) <= 64  # type: ignore[union-attr]
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        llm.generate("x", ignore_eos=True, grammar=grammar)
