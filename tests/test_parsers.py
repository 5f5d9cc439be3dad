"""Parsers of what a model writes, tools and reasoning, on text in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from example_tools import ADD, WEATHER

from llmkit.chat.parsers.events import Call, Content, Event, Parser, Reasoning
from llmkit.chat.tools import make_parser
from llmkit.protocol import Tool

CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


def read(parser: Parser, text: str, size: int) -> list[Event]:
    """All events of a text that comes in pieces of ``size``; neighbours of a kind joined."""
    events: list[Event] = []
    for at in range(0, len(text), size):
        events += parser.push(text[at : at + size])
    events += parser.finish()
    joined: list[Event] = []
    for event in events:
        if joined and isinstance(event, Content | Reasoning) and type(joined[-1]) is type(event):
            joined[-1] = type(event)(joined[-1].text + event.text)  # type: ignore[union-attr]
        else:
            joined.append(event)
    return joined


def plain(events: list[Event]) -> list[Any]:
    return [
        (e.name, json.loads(e.arguments)) if isinstance(e, Call) else (type(e).__name__, e.text)
        for e in events
    ]


SUM = ("add", {"a": 1, "b": 2})


PARIS = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (
            "hermes",
            "Just text, a < b and <tool> too.",
            [("Content", "Just text, a < b and <tool> too.")],
        ),
        (
            "hermes",
            f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>",
            [("Content", "Let me see."), PARIS],
        ),
        (
            "hermes",
            f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n",
            [PARIS, PARIS],
        ),
        ("hermes", f"<tool_call>\n{CALL}", [PARIS]),
        (
            "hermes",
            "<tool_call>\n{broken\n</tool_call> and on",
            [("Content", "<tool_call>\n{broken\n</tool_call> and on")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            [("Content", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>')],
        ),
        ("hermes", "ends with <tool_", [("Content", "ends with <tool_")]),
        ("hermes", "  indented\n  text  \n", [("Content", "  indented\n  text  \n")]),
        (
            "qwen3_coder",
            (
                "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
                "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
            ),
            [("get_weather", {"city": "Paris", "days": 3})],
        ),
        (
            "qwen3_coder",
            (
                "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n"
                "</parameter>\n</function>\n</tool_call>"
            ),
            [SUM],
        ),
        ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        (
            "llama3",
            (
                '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
                '{"name": "add", "parameters": {"a": 1, "b": 2}}'
            ),
            [PARIS, SUM],
        ),
        (
            "llama3",
            '{"name": "add", "parameters": {"a": 1}}',
            [("Content", '{"name": "add", "parameters": {"a": 1}}')],
        ),
        ("llama3", 'The answer is {"name": 1}', [("Content", 'The answer is {"name": 1}')]),
        ("llama3", '{"temperature": 3}', [("Content", '{"temperature": 3}')]),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]',
            [PARIS],
        ),
        ("mistral", "[1, 2] is a list", [("Content", "[1, 2] is a list")]),
        (
            "mistral",
            (
                '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
                '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1, "b": 2}'
            ),
            [PARIS, SUM],
        ),
        ("list", f"<|tool_call|>[{CALL}]<|/tool_call|>", [PARIS]),
        ("list", f"functools[{CALL}]", [PARIS]),
        ("list", "functional", [("Content", "functional")]),
        (
            "harmony",
            (
                "<|channel|>analysis<|message|>Hm.<|end|>"
                "<|start|>assistant<|channel|>final<|message|>A < b.<|return|>"
            ),
            [("Reasoning", "Hm."), ("Content", "A < b.")],
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.get_weather "
            '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            [("Reasoning", "Hm"), PARIS],
        ),
        (
            "harmony",
            ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}',
            [PARIS],
        ),
        (
            "harmony",
            (
                "<|channel|>commentary<|message|>I look."
                "<|channel|>commentary to=functions.unknown<|message|>{}<|call|>"
            ),
            [("Content", "I look.functions.unknown {}")],
        ),
        ("harmony", "Just text", [("Content", "Just text")]),
        ("harmony", "to=", [("Content", "to=")]),
        ("harmony", "<|channel|>final", []),
        (
            "deepseek",
            "Let me see.\n\n<｜tool▁calls▁begin｜>"
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
            '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            [("Content", "Let me see."), PARIS],
        ),
        (
            "deepseek",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
            "<｜tool▁call▁end｜>"
            '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}',
            [PARIS, SUM],
        ),
        ("deepseek", "a <｜tool▁calls", [("Content", "a <｜tool▁calls")]),
        ("deepseek", "<｜tool▁call▁begin｜>what", [("Content", "<｜tool▁call▁begin｜>what")]),
        (
            "function_gemma",
            "Sure. <start_function_call>call:get_weather{city:<escape>Paris<escape>}"
            "<end_function_call>"
            "<start_function_call>call:add{a:1,b:2}<end_function_call>",
            [("Content", "Sure. "), PARIS, SUM],
        ),
        (
            "function_gemma",
            "<start_function_call>call:get_weather{city:<escape>{a}<escape>,days:3",
            [("Content", "<start_function_call>call:get_weather{city:<escape>{a}<escape>,days:3")],
        ),
        (
            "hermes",
            (
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}\n'
                "</tool_call>"
            ),
            [("get_weather", {"city": "a </tool_call> b"})],
        ),
        (
            "qwen3_coder",
            (
                "<tool_call><function=get_weather><parameter=city>"
                "a </parameter> b</parameter></function></tool_call>"
            ),
            [("get_weather", {"city": "a </parameter> b"})],
        ),
        (
            "mistral",
            'I call it.\n[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
            [("Content", "I call it.\n"), PARIS],
        ),
        (
            "harmony",
            "<|channel|>final<|message|>The mark <|end|> ends it.<|end|>",
            [("Content", "The mark <|end|> ends it.")],
        ),
        (
            "function_gemma",
            "<start_function_call>call:get_weather{city:<escape>{, }<escape>,days:3}",
            [("get_weather", {"city": "{, }", "days": 3})],
        ),
        ("general", f"<tool_call>\n{CALL}\n</tool_call>", [PARIS]),
    ],
)
def test_parsers(form: str, text: str, expected: list[Any], size: int) -> None:
    assert plain(read(make_parser(form, "", [WEATHER, ADD]), text, size)) == expected


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("begun", "text", "expected"),
    [
        (
            False,
            "<think>\nHm, a </thin line.\n</think>\n\nYes.",
            [("Reasoning", "Hm, a </thin line."), ("Content", "Yes.")],
        ),
        (True, "Hm.\n</think>\n\nYes.", [("Reasoning", "Hm."), ("Content", "Yes.")]),
        (False, "No thoughts, <b>just</b> text.", [("Content", "No thoughts, <b>just</b> text.")]),
        (False, "<think>cut off", [("Reasoning", "cut off")]),
        (
            False,
            f"<think>I call it.</think>\n<tool_call>{CALL}</tool_call>",
            [("Reasoning", "I call it."), PARIS],
        ),
        (False, "<thin", [("Content", "<thin")]),
    ],
)
def test_reasoning(begun: bool, text: str, expected: list[Any], size: int) -> None:
    assert (
        plain(read(make_parser("hermes", "think", [WEATHER], reasoning_begun=begun), text, size))
        == expected
    )


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" + "[" * 5000,
        "<start_function_call>call:add" + "{a:" * 5000,
        "<|channel|>x to=functions.add<|message|>" + "[" * 5000,
        '<tool_call>{"name": "add", "arguments": "' + "[" * 3000 + '"}</tool_call>',
    ],
)
@pytest.mark.parametrize(
    "form", ["hermes", "llama3", "harmony", "deepseek", "function_gemma", "list"]
)
def test_nothing_a_model_writes_is_an_error(form: str, text: str) -> None:
    for shown in (
        text,
        text.replace("<tool_call>", ""),
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
    ):
        assert "".join(
            e.text
            for e in read(make_parser(form, "", [ADD]), shown, 100_000)
            if isinstance(e, Content)
        )
    spaces = "<tool_call><function=add>" + " " * 200_000 + "x" + "<parameter=a>" * 20_000
    free = Tool("add", "", {})
    assert plain(read(make_parser("qwen3_coder", "", [free]), spaces, 10**6)) == [("add", {})], (
        "and it takes no minutes"
    )
