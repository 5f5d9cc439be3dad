"""Tools and reasoning: the parsers on text in any pieces, the grammars on the real model, the stock client's own helpers as judges."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest
from fakes import FakeClient
from pydantic import BaseModel
from test_gateway import Api, is_error, serve

from llmkit.bridge.server import BridgeServer
from llmkit.chat.parsers.events import Call, Content, Event, Parser, Reasoning
from llmkit.chat.template import CHATML, ChatTemplate
from llmkit.chat.tools import call_grammar, make_parser, reasoning_form, tool_form
from llmkit.errors import InvalidRequestError
from llmkit.gateway.chat import ChatRequest
from llmkit.local import LocalEngine
from llmkit.types import Message, ModelDescription, Tool, ToolCall

WEATHER = Tool(
    "get_weather", "The weather of a city", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
)
ADD = Tool(
    "add", "", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"], "additionalProperties": False}
)
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
    return [(e.name, json.loads(e.arguments)) if isinstance(e, Call) else (type(e).__name__, e.text) for e in events]


SUM = ("add", {"a": 1, "b": 2})
PARIS = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "Just text, a < b and <tool> too.", [("Content", "Just text, a < b and <tool> too.")]),
        ("hermes", f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>", [("Content", "Let me see."), PARIS]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", [PARIS, PARIS]),
        ("hermes", f"<tool_call>\n{CALL}", [PARIS]),
        ("hermes", "<tool_call>\n{broken\n</tool_call> and on", [("Content", "<tool_call>\n{broken\n</tool_call> and on")]),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', [("Content", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>')]),
        ("hermes", "ends with <tool_", [("Content", "ends with <tool_")]),
        ("hermes", "  indented\n  text  \n", [("Content", "  indented\n  text  \n")]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            [("get_weather", {"city": "Paris", "days": 3})],
        ),
        ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>", [SUM]),
        ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ("llama3", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "add", "parameters": {"a": 1, "b": 2}}', [PARIS, SUM]),
        ("llama3", '{"name": "add", "parameters": {"a": 1}}', [("Content", '{"name": "add", "parameters": {"a": 1}}')]),
        ("llama3", 'The answer is {"name": 1}', [("Content", 'The answer is {"name": 1}')]),
        ("llama3", '{"temperature": 3}', [("Content", '{"temperature": 3}')]),
        ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
        ("mistral", "[1, 2] is a list", [("Content", "[1, 2] is a list")]),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1, "b": 2}', [PARIS, SUM]),
        ("list", f"<|tool_call|>[{CALL}]<|/tool_call|>", [PARIS]),
        ("list", f"functools[{CALL}]", [PARIS]),
        ("list", "functional", [("Content", "functional")]),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A < b.<|return|>",
            [("Reasoning", "Hm."), ("Content", "A < b.")],
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
            '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            [("Reasoning", "Hm"), PARIS],
        ),
        ("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}', [PARIS]),
        (
            "harmony",
            "<|channel|>commentary<|message|>I look.<|channel|>commentary to=functions.unknown<|message|>{}<|call|>",
            [("Content", "I look.functions.unknown {}")],
        ),
        ("harmony", "Just text", [("Content", "Just text")]),
        ("harmony", "to=", [("Content", "to=")]),
        ("harmony", "<|channel|>final", []),
        (
            "deepseek",
            "Let me see.\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
            '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            [("Content", "Let me see."), PARIS],
        ),
        (
            "deepseek",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
            '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}',
            [PARIS, SUM],
        ),
        ("deepseek", "a <｜tool▁calls", [("Content", "a <｜tool▁calls")]),
        ("deepseek", "<｜tool▁call▁begin｜>what", [("Content", "<｜tool▁call▁begin｜>what")]),
        (
            "function_gemma",
            "Sure. <start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
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
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a </tool_call> b"}}\n</tool_call>',
            [("get_weather", {"city": "a </tool_call> b"})],
        ),
        (
            "qwen3_coder",
            "<tool_call><function=get_weather><parameter=city>a </parameter> b</parameter></function></tool_call>",
            [("get_weather", {"city": "a </parameter> b"})],
        ),
        ("mistral", 'I call it.\n[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', [("Content", "I call it.\n"), PARIS]),
        ("harmony", "<|channel|>final<|message|>The mark <|end|> ends it.<|end|>", [("Content", "The mark <|end|> ends it.")]),
        ("function_gemma", "<start_function_call>call:get_weather{city:<escape>{, }<escape>,days:3}", [("get_weather", {"city": "{, }", "days": 3})]),
        ("general", f"<tool_call>\n{CALL}\n</tool_call>", [PARIS]),
    ],
)
def test_parsers(form: str, text: str, expected: list[Any], size: int) -> None:
    assert plain(read(make_parser(form, "", [WEATHER, ADD]), text, size)) == expected


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("begun", "text", "expected"),
    [
        (False, "<think>\nHm, a </thin line.\n</think>\n\nYes.", [("Reasoning", "Hm, a </thin line."), ("Content", "Yes.")]),
        (True, "Hm.\n</think>\n\nYes.", [("Reasoning", "Hm."), ("Content", "Yes.")]),
        (False, "No thoughts, <b>just</b> text.", [("Content", "No thoughts, <b>just</b> text.")]),
        (False, "<think>cut off", [("Reasoning", "cut off")]),
        (False, f"<think>I call it.</think>\n<tool_call>{CALL}</tool_call>", [("Reasoning", "I call it."), PARIS]),
        (False, "<thin", [("Content", "<thin")]),
    ],
)
def test_reasoning(begun: bool, text: str, expected: list[Any], size: int) -> None:
    assert plain(read(make_parser("hermes", "think", [WEATHER], reasoning_begun=begun), text, size)) == expected


def test_forms_are_known_by_their_templates() -> None:
    assert tool_form(CHATML) == "general" and tool_form("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_form("{% if tools %}<tool_call><function=x>{% endif %}") == "qwen3_coder" and tool_form("{{ tools }}<|python_tag|>") == "llama3"
    assert tool_form("{{ tools }}[TOOL_CALLS]") == "mistral" and tool_form("{{ tools }}<|tool_call|>") == "list"
    assert tool_form("<|channel|><|message|>") == "harmony" and reasoning_form("<|channel|><|message|>") == "harmony"
    assert tool_form("{{ m.tool_calls }}<｜tool▁call▁begin｜>") == "deepseek" and tool_form("{{ tools }}<start_function_call>") == "function_gemma"
    thinking = ChatTemplate(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    assert thinking.reasoning == "think_always" and ChatTemplate(CHATML).reasoning == "" and ChatTemplate(CHATML + "{# <think> #}").reasoning == "think"


def test_a_template_without_tools_is_told_of_them() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("c1", "add", '{"a": 1, "b": 2}'),))
    conversation = [Message("system", "Be kind."), Message("user", "1+2?"), call, Message("tool", "3", tool_call_id="c1")]
    text = ChatTemplate(CHATML).render(conversation, tools=[ADD])
    assert "Be kind." in text and '"name": "add"' in text and '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in text
    assert "<tool_response>\n3\n</tool_response>" in text and text.endswith("<|im_start|>assistant\n")
    of_calls = (
        "{% for m in messages %}<{{ m.content }}>{% for c in m.tool_calls %}{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    own = ChatTemplate("{% for t in tools %}[{{ t | tojson }}]{% endfor %}" + of_calls + "<tool_call>")
    assert own.render(conversation, tools=[ADD]) == f"[{json.dumps(ADD.function())}]<Be kind.><1+2?><>adda=1;b=2;<3><tool_call>"
    assert ChatTemplate("{{ messages | length }}{{ enable_thinking }}").render([Message("user", "x")], options={"enable_thinking": False}) == "1False"
    with pytest.raises(InvalidRequestError, match="messages is set by the server"):
        ChatTemplate("{{ messages | length }}").render([Message("user", "x")], options={"messages": []})


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" + "[" * 5000,
        "<start_function_call>call:add" + "{a:" * 5000,
        "<|channel|>x to=functions.add<|message|>" + "[" * 5000,
        '<tool_call>{"name": "add", "arguments": "' + "[" * 3000 + '"}</tool_call>',
    ],
)
@pytest.mark.parametrize("form", ["hermes", "llama3", "harmony", "deepseek", "function_gemma", "list"])
def test_nothing_a_model_writes_is_an_error(form: str, text: str) -> None:
    for shown in (text, text.replace("<tool_call>", ""), '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'):
        assert "".join(e.text for e in read(make_parser(form, "", [ADD]), shown, 100_000) if isinstance(e, Content))
    spaces = "<tool_call><function=add>" + " " * 200_000 + "x" + "<parameter=a>" * 20_000
    free = Tool("add", "", {})
    assert plain(read(make_parser("qwen3_coder", "", [free]), spaces, 10**6)) == [("add", {})], "and it takes no minutes"


def test_roles_alternate_where_a_template_knows_no_tools() -> None:
    calls = Message("assistant", tool_calls=(ToolCall("1", "add", "{}"), ToolCall("2", "add", "{}")))
    talk = [Message("user", "x"), calls, Message("tool", "3"), Message("tool", "4"), Message("user", "So?")]
    refuse = "{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    strict = "{% for m in messages %}" + refuse + "{{ m.content }}|{% endfor %}"
    text = ChatTemplate(strict).render(talk, tools=[ADD])
    assert text.count("|") == 3 and '"name": "add"' in text.split("|")[0] and "3\n</tool_response>\n\n<tool_response>\n4" in text and "So?" in text


@pytest.mark.parametrize("arguments", ["[1]", "{", "nope", "null", '{"a":' * 200 + "1" + "}" * 200])
def test_calls_that_come_back_are_not_judged(arguments: str) -> None:
    """What a model wrote once, and was cut off in, must not spoil all that follows."""
    call = {"id": "c", "function": {"name": "add", "arguments": arguments}}
    (message,) = [Message("assistant", tool_calls=(call,))]  # type: ignore[arg-type]
    assert message.tool_calls[0].arguments == arguments and message.as_dict()["tool_calls"][0]["function"]["arguments"] == {"arguments": arguments}
    text = ChatTemplate(CHATML).render([Message("user", "1+2?"), message, Message("tool", "what?", tool_call_id="c")])
    assert json.dumps({"arguments": arguments})[1:-1] in text or arguments in text


# -- over HTTP


def body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER.function(), ADD.function()], **more}


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [WEATHER.function(), WEATHER.function()]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": 5}}}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": []}}]}]}, "messages"),
    ],
)
async def test_bad_tools_are_a_400(api: Api, change: dict[str, Any], param: str) -> None:
    assert is_error(await api.fetch("POST", "/v1/chat/completions", body(**change)), 400)["param"] == param


def test_what_is_asked_of_the_engine() -> None:
    model = ModelDescription("m", "m.gguf")

    def asked(**more: Any) -> Any:
        return ChatRequest.model_validate({**body(), **more}).requests("r", model)[0]

    assert asked().sampling.grammar is not None and [t.name for t in asked().tools] == ["get_weather", "add"]
    assert asked(tool_choice="none").sampling.grammar is None and asked(tool_choice="none").tools == ()
    assert '"const": "add"' in asked(tool_choice={"type": "function", "function": {"name": "add"}}).sampling.grammar.text
    assert asked(chat_template_kwargs={"x": 1}, reasoning_effort="none").template_options == {"x": 1, "reasoning_effort": "none", "enable_thinking": False}


# -- the real model


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    bridge = BridgeServer(engine)
    async for api in serve(None):
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
            yield client
    bridge.close()


QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris for the next three days?"}]
NESTED = {
    "type": "object",
    "properties": {"where": {"$ref": "#/$defs/place"}, "unit": {"enum": ["C", "F"]}},
    "required": ["where", "unit"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"], "additionalProperties": False}},
}


@pytest.mark.model
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "report"}}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_forced_call_always_validates(client: openai.AsyncOpenAI, choice: Any, temperature: float) -> None:
    tools: Any = [Tool("report", "A report", NESTED).function(), ADD.function()]
    reply = await client.chat.completions.create(
        model="smollm2", messages=QUESTION, tools=tools, tool_choice=choice, temperature=temperature, seed=4, max_tokens=200, parallel_tool_calls=False
    )
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls" and message.tool_calls is not None and len(message.tool_calls) == 1 and message.content is None
    (call,) = message.tool_calls
    assert call.id.startswith("call_") and call.type == "function" and (choice == "required" or call.function.name == "report")
    jsonschema.validate(json.loads(call.function.arguments), NESTED if call.function.name == "report" else ADD.parameters)


@pytest.mark.model
async def test_schemas_beyond_the_grammar_are_left_to_the_parser(client: openai.AsyncOpenAI) -> None:
    odd: Any = [Tool("odd", "", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"not": {"type": "null"}}}}}).function()]
    free = await client.chat.completions.create(model="smollm2", messages=QUESTION, tools=odd, max_tokens=5, temperature=0)
    assert free.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="not at #/properties/a/items") as caught:
        await client.chat.completions.create(model="smollm2", messages=QUESTION, tools=odd, max_tokens=5, tool_choice="required")
    assert caught.value.param == "tools"


@pytest.mark.model
async def test_streamed_calls_are_what_the_accumulator_expects(client: openai.AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    async with client.chat.completions.stream(model="smollm2", messages=QUESTION, tools=tools, tool_choice="required", temperature=0, max_tokens=100) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    calls = final.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Weather) and final.choices[0].finish_reason == "tool_calls"
    parsed = await client.chat.completions.parse(model="smollm2", messages=QUESTION, tools=tools, tool_choice="required", temperature=0, max_tokens=100)
    assert parsed.choices[0].message.tool_calls and isinstance(parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@pytest.mark.model
async def test_a_conversation_with_a_tool_goes_on(client: openai.AsyncOpenAI) -> None:
    tools: Any = [ADD.function()]
    messages = [*QUESTION]
    first = await client.chat.completions.create(model="smollm2", messages=messages, tools=tools, tool_choice="required", max_tokens=80, temperature=0)
    messages.append(first.choices[0].message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "18 degrees"} for call in first.choices[0].message.tool_calls or []]
    second = await client.chat.completions.create(model="smollm2", messages=messages, tools=tools, max_tokens=20, temperature=0)
    assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens
    free = await client.chat.completions.create(model="smollm2", messages=QUESTION, tools=tools, max_tokens=30, temperature=0, tool_choice="auto")
    assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.model
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_grammars_hold_what_they_should(engine: LocalEngine, form: str, parallel: bool) -> None:
    def accepts(choice: str, text: str) -> bool:
        grammar = call_grammar(form, [WEATHER, ADD], choice, parallel=parallel)
        assert grammar is not None
        constraint = engine._grammars.compile(grammar)
        assert constraint is not None
        for token in engine._vocab.tokenize(text, add_special=False):
            if not constraint.allows(token):
                return False
            constraint.accept(token)
        return constraint.allows(engine._vocab.eos)

    key = "parameters" if form == "llama3" else "arguments"
    one = json.dumps({"name": "add", key: {"a": 1, "b": 2}})
    bad = json.dumps({"name": "add", key: {"a": "x", "b": 2}})
    wrap = {"hermes": "<tool_call>\n{}\n</tool_call>", "llama3": "{}", "mistral": "[{}]"}[form].replace("{}", "%s")
    two = {"hermes": f"{wrap % one}\n{wrap % one}", "llama3": f"{one};{one}", "mistral": f"[{one}, {one}]"}[form]
    assert accepts("required", wrap % one) and accepts("add", wrap % one) and not accepts("get_weather", wrap % one)
    assert not accepts("required", wrap % bad) and not accepts("required", "Well, no.")
    assert accepts("required", two) is parallel
    if form == "hermes":
        assert accepts("auto", "Well, no.") and accepts("auto", wrap % one) and not accepts("auto", wrap % bad)
        assert accepts("auto", f"Let me see.\n{wrap % one}") and not accepts("auto", f"Let me see.\n{wrap % bad}")
