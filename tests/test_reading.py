"""What an answer is read as: calls that fit their schemas, reasoning where it begins and how much
of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from example_tools import ADD, WEATHER
from fake_runner import FakeRunner
from fakes import FakeClient, ask
from test_parsers import plain

from llmkit.chat.parsers.events import as_call
from llmkit.chat.reading import AnswerReader
from llmkit.chat.tools import call_grammar, marks
from llmkit.protocol import Completion, Delta, FinishReason, ModelDescription, Tool, Usage
from llmkit.sessions.running import Runs, new_id


def test_a_call_must_fit_its_schema_and_no_schema_is_dangerous() -> None:
    slow = {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}}
    far = {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:9/schema"}}}
    broken = {"type": "object", "properties": {"x": {"type": "nonsense"}}}
    many: dict[str, Any] = {
        f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)
    }
    multiplying = {"$ref": "#/$defs/a0", "$defs": {**many, "a30": {"type": "object"}}}
    for schema in (slow, far, broken, multiplying):
        assert as_call({"name": "f", "arguments": {"x": "a" * 60 + "!"}}, {"f": schema}) is not None
    assert (
        as_call({"name": "f", "arguments": {"x": 1}}, {"f": slow}) is None
        and as_call({"name": ["f"]}, {"f": slow}) is None
    )


def test_a_schema_that_refers_to_itself_is_held() -> None:
    node = {
        "type": "object",
        "properties": {
            "v": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["v", "next"],
    }
    grammar = call_grammar("hermes", [ADD, Tool("f", "", node)], "f", parallel=False)
    assert grammar is not None
    schema = json.loads(grammar.text[grammar.text.index("%json") + 5 :])
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"name": "f", "arguments": {"v": 1, "next": {"v": 2, "next": None}}})
    assert not validator.is_valid(
        {"name": "f", "arguments": {"v": 1, "next": {"v": "x", "next": None}}}
    )


@pytest.mark.parametrize(
    ("reasoning", "thinks", "held", "begun"),
    [
        ("think_begun", None, False, True),
        ("think_begun", False, False, False),
        ("think_always", False, False, True),
        ("think_asked", None, False, False),
        ("think_asked", True, False, True),
        ("think_begun", None, True, False),
        ("think", None, False, False),
    ],
)
def test_where_reasoning_has_begun(
    reasoning: str, thinks: bool | None, held: bool, begun: bool
) -> None:
    model = ModelDescription("m", "m.gguf", reasoning=reasoning, tool_form="hermes")
    apart = AnswerReader(model, thinks=thinks, held=held).apart(Completion("a", FinishReason.STOP))
    assert (apart.reasoning, apart.text) == (("a", "") if begun else ("", "a"))


def test_reasoning_is_counted() -> None:
    model = ModelDescription("m", "m.gguf", reasoning="think_begun", tool_form="hermes")
    reader = AnswerReader(model, [WEATHER])
    pieces = ["I", " think", ".", "</", "think>", "\n\n", "Yes", "."]
    events = [e for p in pieces for e in reader.read([Delta(p, 1)])]
    rest, completion = reader.end(
        Completion("".join(pieces), FinishReason.STOP, Usage(3, len(pieces)))
    )
    assert plain(events + rest) == [
        ("Reasoning", "I"),
        ("Reasoning", " think"),
        ("Reasoning", "."),
        ("Content", "Yes"),
        ("Content", "."),
    ]
    assert completion.usage == Usage(3, 8, 0, 4), "the closing tag's first half counts"
    apart = AnswerReader(model).apart(Completion("Hm.</think>Yes.", FinishReason.STOP))
    assert (apart.reasoning, apart.text) == ("Hm.", "Yes.")


def test_marks_are_shown_to_the_parser_alone() -> None:
    assert (
        "<|channel|>" in marks("harmony")
        and "<|tool_call|>" in marks("list")
        and "<tool_call>" in marks("hermes")
    )


def test_the_newest_answer_is_read_as_chat_reads_it() -> None:
    """What came with its marks (of reasoning) is told without them, also when it was stopped."""
    fake = FakeClient(runner=FakeRunner(step_s=0.005))
    runs = Runs(lambda: fake, lambda done, held: replace(done, text=f"read {held}"))
    plain, marked = ask("a", max_tokens=3), replace(ask("b", max_tokens=3), show_marks=True)
    assert (
        runs.complete([plain])[0].text == runs.last.text == fake.runner.reference(b"a", 3).decode()
    )
    assert runs.complete([marked])[0].text != runs.last.text == "read False"
    fake.runner.step_s = 0.5  # which outlasts whatever comes before the stop
    stream = runs.submit(
        replace(marked, request_id=new_id(), sampling=replace(marked.sampling, max_tokens=200))
    )
    runs.stop([stream])
    assert runs.last.finish_reason == FinishReason.ABORT and runs.last.text == "read False"
    fake.close()
