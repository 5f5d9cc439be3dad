"""Tools on the real model: what its grammars hold, with the stock client's own helpers as
judges."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest
from example_tools import ADD, WEATHER
from gateway_client import serve
from pydantic import BaseModel

from llmkit.bridge.server import BridgeServer
from llmkit.chat.conversation import tool_dict
from llmkit.chat.tools import call_grammar
from llmkit.protocol import Tool
from llmkit.runtime.local import LocalEngine


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


QUESTION: Any = [
    {"role": "user", "content": "What is the weather in Paris for the next three days?"}
]


NESTED = {
    "type": "object",
    "properties": {"where": {"$ref": "#/$defs/place"}, "unit": {"enum": ["C", "F"]}},
    "required": ["where", "unit"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.model
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "report"}}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_forced_call_always_validates(
    client: openai.AsyncOpenAI, choice: Any, temperature: float
) -> None:
    tools: Any = [tool_dict(Tool("report", "A report", NESTED)), tool_dict(ADD)]
    reply = await client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        tools=tools,
        tool_choice=choice,
        temperature=temperature,
        seed=4,
        max_tokens=200,
        parallel_tool_calls=False,
    )
    message = reply.choices[0].message
    assert (
        reply.choices[0].finish_reason == "tool_calls"
        and message.tool_calls is not None
        and len(message.tool_calls) == 1
        and message.content is None
    )
    (call,) = message.tool_calls
    assert (
        call.id.startswith("call_")
        and call.type == "function"
        and (choice == "required" or call.function.name == "report")
    )
    jsonschema.validate(
        json.loads(call.function.arguments),
        NESTED if call.function.name == "report" else ADD.parameters,
    )


@pytest.mark.model
async def test_schemas_beyond_the_grammar_are_left_to_the_parser(
    client: openai.AsyncOpenAI,
) -> None:
    odd: Any = [
        tool_dict(
            Tool(
                "odd",
                "",
                {
                    "type": "object",
                    "properties": {
                        "a": {
                            "type": "array",
                            "uniqueItems": True,
                            "items": {"not": {"type": "null"}},
                        }
                    },
                },
            )
        )
    ]
    free = await client.chat.completions.create(
        model="smollm2", messages=QUESTION, tools=odd, max_tokens=5, temperature=0
    )
    assert free.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="not at #/properties/a/items") as caught:
        await client.chat.completions.create(
            model="smollm2", messages=QUESTION, tools=odd, max_tokens=5, tool_choice="required"
        )
    assert caught.value.param == "tools"


@pytest.mark.model
async def test_streamed_calls_are_what_the_accumulator_expects(client: openai.AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    async with client.chat.completions.stream(
        model="smollm2",
        messages=QUESTION,
        tools=tools,
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert (
        "tool_calls.function.arguments.delta" in kinds
        and "tool_calls.function.arguments.done" in kinds
    )
    calls = final.choices[0].message.tool_calls
    assert (
        calls
        and isinstance(calls[0].function.parsed_arguments, Weather)
        and final.choices[0].finish_reason == "tool_calls"
    )
    parsed = await client.chat.completions.parse(
        model="smollm2",
        messages=QUESTION,
        tools=tools,
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    )
    assert parsed.choices[0].message.tool_calls and isinstance(
        parsed.choices[0].message.tool_calls[0].function.parsed_arguments, Weather
    )


@pytest.mark.model
async def test_a_conversation_with_a_tool_goes_on(client: openai.AsyncOpenAI) -> None:
    tools: Any = [tool_dict(ADD)]
    messages = [*QUESTION]
    first = await client.chat.completions.create(
        model="smollm2",
        messages=messages,
        tools=tools,
        tool_choice="required",
        max_tokens=80,
        temperature=0,
    )
    messages.append(first.choices[0].message)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
        for call in first.choices[0].message.tool_calls or []
    ]
    second = await client.chat.completions.create(
        model="smollm2", messages=messages, tools=tools, max_tokens=20, temperature=0
    )
    assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens
    free = await client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        tools=tools,
        max_tokens=30,
        temperature=0,
        tool_choice="auto",
    )
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
    wrap = {"hermes": "<tool_call>\n{}\n</tool_call>", "llama3": "{}", "mistral": "[{}]"}[
        form
    ].replace("{}", "%s")
    two = {
        "hermes": f"{wrap % one}\n{wrap % one}",
        "llama3": f"{one};{one}",
        "mistral": f"[{one}, {one}]",
    }[form]
    assert (
        accepts("required", wrap % one)
        and accepts("add", wrap % one)
        and not accepts("get_weather", wrap % one)
    )
    assert not accepts("required", wrap % bad) and not accepts("required", "Well, no.")
    assert accepts("required", two) is parallel
    if form == "hermes":
        assert (
            accepts("auto", "Well, no.")
            and accepts("auto", wrap % one)
            and not accepts("auto", wrap % bad)
        )
        assert accepts("auto", f"Let me see.\n{wrap % one}") and not accepts(
            "auto", f"Let me see.\n{wrap % bad}"
        )
