"""Tools: how templates are told of them, what is refused, and what is asked of the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from example_tools import ADD, WEATHER
from fakes import FakeClient
from gateway_client import Api, is_error, serve

from llmkit.bridge.server import BridgeServer
from llmkit.chat.conversation import message_dict, tool_dict
from llmkit.chat.template import CHATML, ChatTemplate
from llmkit.chat.tools import reasoning_form, tool_form
from llmkit.errors import InvalidRequestError
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.protocol import Message, ModelDescription, ToolCall
from llmkit.sessions.messages import as_messages, from_json, to_json


def test_forms_are_known_by_their_templates() -> None:
    assert (
        tool_form(CHATML) == "general"
        and tool_form("{% if tools %}<tool_call>{% endif %}") == "hermes"
    )
    assert (
        tool_form("{% if tools %}<tool_call><function=x>{% endif %}") == "qwen3_coder"
        and tool_form("{{ tools }}<|python_tag|>") == "llama3"
    )
    assert (
        tool_form("{{ tools }}[TOOL_CALLS]") == "mistral"
        and tool_form("{{ tools }}<|tool_call|>") == "list"
    )
    assert (
        tool_form("<|channel|><|message|>") == "harmony"
        and reasoning_form("<|channel|><|message|>") == "harmony"
    )
    assert (
        tool_form("{{ m.tool_calls }}<｜tool▁call▁begin｜>") == "deepseek"
        and tool_form("{{ tools }}<start_function_call>") == "function_gemma"
    )
    thinking = ChatTemplate(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    assert (
        thinking.reasoning == "think_always"
        and ChatTemplate(CHATML).reasoning == ""
        and ChatTemplate(CHATML + "{# <think> #}").reasoning == "think"
    )


def test_a_template_without_tools_is_told_of_them() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("c1", "add", '{"a": 1, "b": 2}'),))
    conversation = [
        Message("system", "Be kind."),
        Message("user", "1+2?"),
        call,
        Message("tool", "3", tool_call_id="c1"),
    ]
    text = ChatTemplate(CHATML).render(conversation, tools=[ADD])
    assert (
        "Be kind." in text
        and '"name": "add"' in text
        and '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in text
    )
    assert "<tool_response>\n3\n</tool_response>" in text and text.endswith(
        "<|im_start|>assistant\n"
    )
    of_calls = (
        "{% for m in messages %}<{{ m.content }}>{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    own = ChatTemplate(
        "{% for t in tools %}[{{ t | tojson }}]{% endfor %}" + of_calls + "<tool_call>"
    )
    assert (
        own.render(conversation, tools=[ADD])
        == f"[{json.dumps(tool_dict(ADD))}]<Be kind.><1+2?><>adda=1;b=2;<3><tool_call>"
    )
    assert (
        ChatTemplate("{{ messages | length }}{{ enable_thinking }}").render(
            [Message("user", "x")], options={"enable_thinking": False}
        )
        == "1False"
    )
    with pytest.raises(InvalidRequestError, match="messages is set by the server"):
        ChatTemplate("{{ messages | length }}").render(
            [Message("user", "x")], options={"messages": []}
        )


def test_roles_alternate_where_a_template_knows_no_tools() -> None:
    calls = Message(
        "assistant", tool_calls=(ToolCall("1", "add", "{}"), ToolCall("2", "add", "{}"))
    )
    talk = [
        Message("user", "x"),
        calls,
        Message("tool", "3"),
        Message("tool", "4"),
        Message("user", "So?"),
    ]
    refuse = (
        "{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('no') }}{% endif %}"
    )
    strict = "{% for m in messages %}" + refuse + "{{ m.content }}|{% endfor %}"
    text = ChatTemplate(strict).render(talk, tools=[ADD])
    assert (
        text.count("|") == 3
        and '"name": "add"' in text.split("|")[0]
        and "3\n</tool_response>\n\n<tool_response>\n4" in text
        and "So?" in text
    )


@pytest.mark.parametrize("arguments", ["[1]", "{", "nope", "null", '{"a":' * 200 + "1" + "}" * 200])
def test_calls_that_come_back_are_not_judged(arguments: str) -> None:
    """What a model wrote once, and was cut off in, must not spoil all that follows."""
    call = {"id": "c", "function": {"name": "add", "arguments": arguments}}
    (message,) = as_messages({"role": "assistant", "tool_calls": [call]})
    assert message.tool_calls[0].arguments == arguments and message_dict(message)["tool_calls"][0][
        "function"
    ]["arguments"] == {"arguments": arguments}
    text = ChatTemplate(CHATML).render(
        [Message("user", "1+2?"), message, Message("tool", "what?", tool_call_id="c")]
    )
    assert json.dumps({"arguments": arguments})[1:-1] in text or arguments in text


@pytest.mark.parametrize("calls", [5, ["x"], [{"id": "c"}], [{"function": "f"}]])
def test_what_is_no_call_is_refused(calls: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tool_calls"):
        as_messages({"role": "assistant", "tool_calls": calls})
    with pytest.raises(InvalidRequestError, match="ToolCall"):
        Message("assistant", tool_calls=calls)


def test_files_keep_what_a_model_wrote() -> None:
    call = ToolCall("c", "add", '{"a": ')
    message = Message("assistant", "Well.", tool_calls=(call,), reasoning_content="Hm.")
    assert from_json(json.loads(json.dumps(to_json(message)))) == message


def body(**more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool_dict(WEATHER), tool_dict(ADD)],
        **more,
    }


@pytest.fixture
async def api(fake: FakeClient) -> AsyncIterator[Api]:
    bridge = BridgeServer(fake)
    async for api in serve(None):
        yield api
    bridge.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [tool_dict(WEATHER), tool_dict(WEATHER)]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"$defs": 5}}}
                ]
            },
            "tools",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": []}}],
                    }
                ]
            },
            "messages",
        ),
    ],
)
async def test_bad_tools_are_a_400(api: Api, change: dict[str, Any], param: str) -> None:
    assert (
        is_error(await api.fetch("POST", "/v1/chat/completions", body(**change)), 400)["param"]
        == param
    )


def test_what_is_asked_of_the_engine() -> None:
    model = ModelDescription("m", "m.gguf")

    def asked(**more: Any) -> Any:
        asked = ChatRequest.model_validate({**body(), **more})
        return asked.chat(model, Attached(model)).request("r", model)

    assert asked().sampling.grammar is not None and [t.name for t in asked().tools] == [
        "get_weather",
        "add",
    ]
    assert (
        asked(tool_choice="none").sampling.grammar is None and asked(tool_choice="none").tools == ()
    )
    assert (
        '"const": "add"'
        in asked(
            tool_choice={"type": "function", "function": {"name": "add"}}
        ).sampling.grammar.text
    )
    assert asked(chat_template_kwargs={"x": 1}, reasoning_effort="none").template_options == {
        "x": 1,
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
