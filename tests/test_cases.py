"""Inputs of people who used servers like ours, each with the right value: `cases/`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fakes import wait_for

from llmkit.chat.template import ChatTemplate
from llmkit.protocol import Message, Tool, ToolCall

CASES = Path(__file__).parent / "cases"


def load(name: str) -> Any:
    return json.loads((CASES / name).read_text())


def template(name: str) -> ChatTemplate:
    return ChatTemplate((CASES / name).read_text(), bos="<s>", eos="</s>")


def conversation() -> tuple[list[Message], list[Tool]]:
    given = load("conversation.json")
    messages = [
        Message(
            m["role"],
            m.get("content") or "",
            tool_calls=tuple(
                ToolCall(
                    c["id"],
                    c["function"]["name"],
                    a if isinstance(a := c["function"]["arguments"], str) else json.dumps(a),
                )
                for c in m.get("tool_calls", ())
            ),
            tool_call_id=m.get("tool_call_id"),
            name=m.get("name"),
        )
        for m in given["messages"]
    ]
    return messages, [
        Tool(
            t["function"]["name"], t["function"].get("description", ""), t["function"]["parameters"]
        )
        for t in given["tools"]
    ]


def test_tojson_takes_its_options() -> None:
    messages, tools = conversation()
    assert template("01-json-options.jinja").render(messages, tools=tools) == (
        '<tools>\n{"type": "function", "function": {"name": "look_up", '
        '"description": "Schlägt ein Wort nach", "parameters": {"type": "object", '
        '"properties": {"term": {"type": "string", "description": "das Wort"}}, '
        '"required": ["term"]}}}\n</tools> Calls stand between <tool_call> and '
        "</tool_call>.\n<user>What is a newt?\n"
        '<assistant><tool_call>{"name": "look_up", "arguments": {"term": "newt"}}</tool_call>\n'
        "<tool>a small amphibian\n<assistant>"
    )


def test_blocks_for_training_show_nothing() -> None:
    messages = [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Bye")]
    assert (
        template("02-generation-block.jinja").render(messages)
        == "<user>Hi\n<assistant>Hello.</s>\n<user>Bye\n<assistant>"
    )


def test_arguments_come_as_the_template_takes_them_and_tools_are_told() -> None:
    messages, tools = conversation()
    whole = template("03-arguments-as-text.jinja").render(messages, tools=tools)
    assert whole.endswith(
        "<user>What is a newt?\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n"
        '{"term": "newt"}\n```<｜tool▁call▁end｜>\n<result>a small amphibian\n<assistant>'
    )
    told = template("03-arguments-as-text.jinja").render(messages[:1], tools=tools)
    assert "look_up" in told and "term" in told and "What is a newt?" in told


def test_no_role_is_lost() -> None:
    messages = [Message(m["role"], m["content"]) for m in load("04-no-developer.json")["messages"]]
    assert (
        template("04-no-developer.jinja")
        .render(messages)
        .startswith("<|im_start|>system\nAnswer in rhymes.<|im_end|>\n<|im_start|>user\nHello!")
    )


class Served:
    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        headers = {"Authorization": "Bearer K", "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, json.dumps(body).encode(), headers),
                timeout=60,
            ) as reply:
                text = reply.read().decode()
                return reply.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    command = [
        sys.executable,
        "-m",
        "llmkit",
        "serve",
        "smollm2",
        "--n-ctx",
        "2048",
        "--api-key",
        "K",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            served = Served(process.stdout.readline().split(" at ")[1].strip().removesuffix("/v1"))
            wait_for(
                lambda: served.post("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200,
                60,
            )
            yield served
        finally:
            process.terminate()


@pytest.mark.model
def test_the_developer_is_the_system_where_the_model_knows_none(served: Served) -> None:
    messages = load("04-no-developer.json")["messages"]
    as_system = [{**m, "role": m["role"].replace("developer", "system")} for m in messages]
    assert served.post("/apply-template", {"messages": messages}) == served.post(
        "/apply-template", {"messages": as_system}
    )


@pytest.mark.model
def test_a_begun_answer_goes_on(served: Served) -> None:
    body = load("06-begun-answer.json")
    status, reply = served.post("/v1/messages", body)
    assert (
        status == 200
        and reply["content"][0]["text"] == " Paris, France."
        and reply["usage"]["input_tokens"] == 45
    )
    assert (
        served.post("/v1/messages/count_tokens", {"messages": body["messages"]})[1]["input_tokens"]
        == 45
    )
    options = {"temperature": 0, "num_predict": 12}
    _, reply = served.post(
        "/api/chat",
        {"model": "smollm2", "messages": body["messages"], "stream": False, "options": options},
    )
    assert reply["message"]["content"] == " Paris, France." and reply["prompt_eval_count"] == 45
    _, text = served.post("/v1/messages", {**body, "stream": True})
    assert (
        "".join(
            json.loads(line[6:])["delta"]["text"]
            for line in text.split("\n")
            if '"text_delta"' in line
        )
        == " Paris, France."
    )


@pytest.mark.model
def test_what_a_model_wrote_is_not_judged(served: Served) -> None:
    assert served.post("/v1/chat/completions", load("07-broken-call.json"))[0] == 200


@pytest.mark.model
def test_one_of_one_is_no_choice(served: Served) -> None:
    status, text = served.post("/v1/completions", load("08-one-of-one.json"))
    assert status == 200 and text.endswith("data: [DONE]\n\n")


@pytest.mark.model
def test_a_grammar_with_escapes_is_the_one_with_letters(served: Served) -> None:
    body = {
        "prompt": "I like ",
        "max_tokens": 12,
        "temperature": 0,
        "grammar": (CASES / "09-emoji.gbnf").read_text(),
    }
    status, reply = served.post("/v1/completions", body)
    assert status == 200 and re.fullmatch(
        r"\w+\u00e9 [\U0001f600-\U0001f64f]", reply["choices"][0]["text"]
    )


@pytest.mark.model
@pytest.mark.parametrize("name", ["10-formats.json", "12-key-names.json"])
def test_keywords_that_ask_nothing_are_passed_over(served: Served, name: str) -> None:
    schema = load(name)
    asked = {
        "messages": [{"role": "user", "content": "Make one."}],
        "max_tokens": 80,
        "temperature": 0,
    }
    status, reply = served.post(
        "/v1/chat/completions",
        {
            **asked,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            },
        },
    )
    assert status == 200
    jsonschema.validate(json.loads(reply["choices"][0]["message"]["content"]), schema)
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    status, reply = served.post(
        "/v1/chat/completions", {**asked, "tool_choice": "required", "tools": tools}
    )
    assert status == 200
    jsonschema.validate(
        json.loads(reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]), schema
    )


@pytest.mark.model
def test_a_forced_call_is_a_call(served: Served) -> None:
    status, reply = served.post("/v1/chat/completions", load("11-forced-call.json"))
    choice = reply["choices"][0]
    assert status == 200 and choice["finish_reason"] == "tool_calls"
    assert [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [
        {"level": 1}
    ]


@pytest.mark.model
def test_a_prompt_is_read_in_one_way(served: Served) -> None:
    body = load("13-spelled-out-prompt.json")
    _, reply = served.post("/v1/completions", body)
    assert (
        reply["usage"]["prompt_tokens"] == 16
        and reply["choices"][0]["text"] == "The capital of France is Paris."
    )
    assert served.post("/tokenize", {"prompt": body["prompt"]})[1]["count"] == 16


@pytest.mark.model
def test_items_of_stored_responses_can_be_referred_to(served: Served) -> None:
    first, second = load("14-reference.json")
    item = served.post("/v1/responses", first)[1]["output"][0]
    second["input"][1]["id"] = item["id"]
    status, referred = served.post("/v1/responses", second)
    second["input"][1] = {
        "type": "message",
        "role": "assistant",
        "content": item["content"][0]["text"],
    }
    _, spelled = served.post("/v1/responses", second)
    assert (
        status == 200
        and referred["output"][0]["content"][0]["text"]
        == spelled["output"][0]["content"][0]["text"]
    )
    status, error = served.post(
        "/v1/responses", {"input": [{"type": "item_reference", "id": "msg_nope"}]}
    )
    assert status == 404 and "msg_nope" in error["error"]["message"]


@pytest.mark.model
def test_what_claude_code_and_codex_send_is_taken_and_named(served: Served) -> None:
    def ignored(path: str, body: Any) -> set[str]:
        request = urllib.request.Request(
            served.url + path, json.dumps(body).encode(), {"Authorization": "Bearer K"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return set((reply.headers["x-llmkit-ignored"] or "").split(", "))

    claude = {
        "model": "smollm2",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Hi"}],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    }
    assert {"context_management", "thinking.budget_tokens", "tools[web_search_*]"} <= ignored(
        "/v1/messages?beta=true", claude
    )
    codex = {
        "model": "smollm2",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "x"}],
            },
            {"role": "user", "content": "y"},
        ],
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto", "effort": "medium"},
        "max_output_tokens": 5,
        "store": False,
        "client_metadata": {"a": "b"},
        "tools": [{"type": "web_search\r\né"}, {"type": "namespace", "name": "n", "tools": []}],
    }
    named = {
        "include[reasoning.encrypted_content]",
        "reasoning.summary",
        "reasoning.effort",
        "client_metadata",
        "tools[web_search*]",
        "tools[namespace]",
    }
    assert named <= ignored("/v1/responses", codex)
    status, error = served.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temprature": 1}
    )
    assert status == 400 and "temperature" in error["error"]["message"]
