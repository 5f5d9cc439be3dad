"""Chat templates in the shape of the twenty most used families, `templates/`: nothing that is said
to one of them is lost. Their texts are our own; of each family they have the marks, the roles that
it takes, what it refuses, and how it shows tools."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.chat.parsers.events import Content, Reasoning
from llmkit.chat.reading import AnswerReader
from llmkit.chat.template import TRIAL_STEPS, ChatTemplate
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Completion, FinishReason, Message, ModelDescription, Tool, ToolCall
from llmkit.runtime.prompts import Files, chat_prompt

FOLDER = Path(__file__).parent / "templates"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
# This one has the system's words in the last turn of the user.
SYSTEM_LAST = {"mistral-v0.3"}

SYSTEM = Message("system", "Answer in rhymes.")
ASKED = Message("user", "Where do newts live?")
ANSWER = Message("assistant", "In ponds and ditches.")
MORE = Message("user", "And in winter?")

FIELDS = {"town": {"type": "string", "description": "where it is"}, "days": {"type": "integer"}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": ["town"]}
FORECAST = Tool("get_forecast", "Tells the weather to come", SCHEMA)
ID = "call_0a1b2c3d4e5f6071829304a5"
ARGUMENTS = '{"town": "Reykjavik", "days": 3}'
NOTHING: Any = None
CALL = Message("assistant", NOTHING, tool_calls=(ToolCall(ID, "get_forecast", ARGUMENTS),))
RESULT = Message("tool", "windy and 7 degrees", tool_call_id=ID)

# How a prompt ends where it is the assistant's turn after the user's "And in winter?".
TURN = {
    "command-r": "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "deepseek-r1": "<｜Assistant｜><think>\n",
    "deepseek-v3": "<｜Assistant｜></think>",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
    "gemma3": "<end_of_turn>\n<start_of_turn>model\n",
    "glm4": "<|assistant|>",
    "gpt-oss": "<|end|><|start|>assistant",
    "granite3": "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "hermes": "<|im_end|>\n<|im_start|>assistant\n",
    "kimi-k2": "<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "llama2": " [/INST]",
    "llama3.1": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.2": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-small": "[/INST]",
    "mistral-v0.3": "[/INST]",
    "phi3": "<|end|>\n<|assistant|>\n",
    "phi4": "<|im_end|><|im_start|>assistant<|im_sep|>",
    "qwen2.5": "<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_end|>\n<|im_start|>assistant\n",
    "smollm3": "<|im_end|>\n<|im_start|>assistant\n",
}

# What is found out about each: what it takes, beside arguments as an object and content as "".
SHOWS = "calls results many_calls tools"
TAKES = {
    "command-r": f"system later_system repeats {SHOWS}",
    "deepseek-r1": "system repeats calls results many_calls text none",
    "deepseek-v3": "system later_system repeats calls results many_calls text",
    "gemma2": "",
    "gemma3": "system",
    "glm4": f"system later_system repeats {SHOWS}",
    "gpt-oss": "system developer repeats calls results tools",
    "granite3": "system later_system repeats tools",
    "hermes": f"system later_system repeats {SHOWS}",
    "kimi-k2": f"system later_system repeats {SHOWS}",
    "llama2": "system",
    "llama3.1": "system later_system repeats calls results tools",
    "llama3.2": "system later_system repeats calls results tools",
    "mistral-small": f"system {SHOWS} short_ids",
    "mistral-v0.3": f"system {SHOWS} short_ids",
    "phi3": "system later_system repeats",
    "phi4": "system later_system repeats",
    "qwen2.5": f"system later_system repeats {SHOWS}",
    "qwen3": f"system later_system repeats {SHOWS}",
    "smollm3": "system repeats",
}

# A call as each shows it; the others are told in our words. The arguments stand for {}.
OURS = '<tool_call>\n{"name": "get_forecast", "arguments": {}}\n</tool_call>'
LLAMA = '<|end_header_id|>\n\n{"name": "get_forecast", "parameters": {}}<|eot_id|>'
FENCED = "function<｜tool▁sep｜>get_forecast\n```json\n{}\n```<｜tool▁call▁end｜>"
OWN = {
    "deepseek-r1": FENCED,
    "deepseek-v3": "<｜tool▁call▁begin｜>get_forecast<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "gpt-oss": "to=functions.get_forecast<|channel|>commentary json<|message|>{}<|call|>",
    "llama3.1": LLAMA,
    "llama3.2": LLAMA,
    "mistral-small": '[TOOL_CALLS][{"name": "get_forecast", "arguments": {}, "id": "',
    "mistral-v0.3": '[TOOL_CALLS] [{"name": "get_forecast", "arguments": {}, "id": "',
}

families = pytest.mark.parametrize("family", FAMILIES)


@cache
def template(family: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{family}.jinja").read_text(), bos="<s>", eos="</s>")


def render(family: str, messages: list[Message], **more: Any) -> str:
    return template(family).render(messages, **more)


def order(text: str, *said: str) -> list[str]:
    """What was said, as it stands in the text; each of it must stand there once."""
    assert {s: text.count(s) for s in said} == dict.fromkeys(said, 1)
    return sorted(said, key=text.index)


def system_in_place(family: str, *said: str) -> list[str]:
    """What was said, the system first, in the order in which the family has it."""
    system, *others = said
    return [*others[:-1], system, others[-1]] if family in SYSTEM_LAST else [*said]


def test_there_are_twenty() -> None:
    assert len(FAMILIES) == 20 and set(FAMILIES) == set(TURN) == set(TAKES)


@families
def test_it_is_compiled_and_tried_soon(family: str) -> None:
    began = time.thread_time()
    fresh = ChatTemplate(template(family).source, bos="<s>", eos="</s>")
    assert fresh.manners is fresh.manners and fresh.reasoning == template(family).reasoning
    assert time.thread_time() - began < 10
    assert fresh._trials._left > TRIAL_STEPS * 0.9, "all that there is to find out can be paid for"


def test_an_answer_after_a_result_is_no_reasoning_where_the_prompt_opens_none() -> None:
    """R1's template opens the tag after what a user said, and not after what a tool gave."""
    r1, qwen = template("deepseek-r1"), template("qwen3")
    assert (
        r1.reasoning == "think_always"
        and not r1.reasons_after_results
        and qwen.reasons_after_results
    )
    model = ModelDescription(
        "r1", "r1.gguf", tool_form=r1.tool_form, reasoning=r1.reasoning, reasons_after_results=False
    )
    done = Completion("It is cold.", FinishReason.STOP)
    assert AnswerReader(model, after_results=True).whole(done) == [Content("It is cold.")]
    assert AnswerReader(model).whole(done) == [Reasoning("It is cold.")]


@families
def test_what_it_takes_is_found_out(family: str) -> None:
    found = asdict(template(family).manners)
    if not found["calls"]:
        found["many_calls"] = False  # which is not asked then
    taken = {key for key in " ".join(TAKES.values()).split() if found.get(key) is True}
    taken |= {found["arguments"], found["content"]} - {"object", ""}
    assert taken == set(TAKES[family].split())


@families
def test_a_conversation_is_shown_once_and_in_order(family: str) -> None:
    text = render(family, [SYSTEM, ASKED, ANSWER, MORE])
    said = system_in_place(family, *(m.content for m in (SYSTEM, ASKED, ANSWER, MORE)))
    assert order(text, *said) == said
    assert text.endswith(MORE.content + TURN[family])


@families
def test_a_developer_is_a_system(family: str) -> None:
    text = render(family, [replace(SYSTEM, role="developer"), ASKED])
    said = [SYSTEM.content, ASKED.content]
    assert text == render(family, [SYSTEM, ASKED]) and order(text, *said) == said


@families
@pytest.mark.parametrize(
    "roles",
    [
        "user user",
        "system system user",
        "system developer user",
        "developer system user",
        "developer developer user",
        "user assistant assistant user",
        "user user assistant user user",
        "system user system user",
        "user assistant system user",
        "user assistant developer user",
        "user assistant system",
        "system",
    ],
)
def test_no_order_of_roles_loses_anything(family: str, roles: str) -> None:
    said = [f"saying number {i}." for i in range(len(roles.split()))]
    messages = [Message(role, text) for role, text in zip(roles.split(), said, strict=True)]
    shown = order(render(family, messages), *said)
    spoken = [m.content for m in messages if m.role in ("user", "assistant")]
    assert [s for s in shown if s in spoken] == spoken


@families
@pytest.mark.parametrize(
    "messages",
    [
        [ANSWER, MORE],
        [SYSTEM, ANSWER, MORE],
        [SYSTEM, CALL, RESULT, MORE],
        [SYSTEM, RESULT, MORE],
    ],
    ids=["answer", "system, answer", "call", "result"],
)
def test_what_has_no_beginning_is_shown_or_refused(family: str, messages: list[Message]) -> None:
    """As clients send it that cut off old messages."""
    try:
        text = render(family, messages, tools=[FORECAST])
    except InvalidRequestError:
        return
    said = [m.content or "Reykjavik" for m in messages if m != SYSTEM]
    assert order(text, *said) == said
    assert text.count(SYSTEM.content) == messages.count(SYSTEM)


@families
@pytest.mark.parametrize("last", ["user", "tool", "tool, user"])
def test_a_conversation_with_a_tool_is_shown_whole(family: str, last: str) -> None:
    messages = [SYSTEM, ASKED, CALL, RESULT, ANSWER, MORE]
    if last != "user":
        messages = [SYSTEM, ASKED, CALL, RESULT, *([MORE] if last == "tool, user" else [])]
    text = render(family, messages, tools=[FORECAST])
    said = [ASKED.content, "Reykjavik", *(m.content for m in messages[3:])]
    assert order(text, *said) == said
    assert [text.count(t) for t in (SYSTEM.content, FORECAST.description)] == [1, 1]
    assert all(t in text for t in ("get_forecast", "town", "days", "where it is"))
    assert re.search(r'"?days"?: ?3\b', text)


@families
@pytest.mark.parametrize("call_id", [ID, "call_1", "abcDEF123", "functions.get_forecast:0"])
def test_a_call_is_shown_as_the_family_does(family: str, call_id: str) -> None:
    call = replace(CALL, tool_calls=(replace(CALL.tool_calls[0], call_id=call_id),))
    messages = [ASKED, call, replace(RESULT, tool_call_id=call_id)]
    text = render(family, messages, tools=[FORECAST])
    assert OWN.get(family, OURS).replace("{}", ARGUMENTS) in text
    for given in re.findall(r'"(?:call_)?id": "(\w*)"', text) if "mistral" in family else ():
        assert re.fullmatch(r"[A-Za-z0-9]{9}", given)


@families
def test_a_result_needs_no_id(family: str) -> None:
    """Ollama's clients send none."""
    messages = [SYSTEM, ASKED, CALL, replace(RESULT, tool_call_id=None), ANSWER, MORE]
    text = render(family, messages, tools=[FORECAST])
    said = [ASKED.content, "Reykjavik", RESULT.content, ANSWER.content, MORE.content]
    assert order(text, *said) == said and text.count(SYSTEM.content) == 1


@families
def test_two_calls_at_once_keep_their_results(family: str) -> None:
    towns = ("Reykjavik", "Lisbon")
    calls = tuple(ToolCall(ID[:-1] + t[0], "get_forecast", json.dumps({"town": t})) for t in towns)
    given = [Message("tool", f"windy in {t[:3]}.", tool_call_id=ID[:-1] + t[0]) for t in towns]
    both = Message("assistant", tool_calls=calls)
    text = render(family, [SYSTEM, ASKED, both, *given, ANSWER, MORE], tools=[FORECAST])
    said = [*towns, *(m.content for m in given)]
    if family in ("gpt-oss", "llama3.1", "llama3.2"):  # one after the other
        said = [said[0], said[2], said[1], said[3]]
    assert order(text, *said) == said
    assert [text.count(m.content) for m in (SYSTEM, ASKED, ANSWER, MORE)] == [1, 1, 1, 1]


@families
def test_a_call_without_words_has_none(family: str) -> None:
    assert CALL.content == ""
    text = render(family, [ASKED, CALL, RESULT], tools=[FORECAST])
    assert "None" not in text and "undefined" not in text.lower()
    assert text == render(family, [ASKED, replace(CALL, content=""), RESULT], tools=[FORECAST])
    assert "<｜Assistant｜><｜end▁of▁sentence｜>" not in text, "nor a turn in which nothing is said"


@families
@pytest.mark.parametrize("thoughts", [None, "They may mean Iceland."])
@pytest.mark.parametrize("answered", [False, True])
def test_words_beside_a_call_are_shown(family: str, thoughts: str | None, answered: bool) -> None:
    speaking = replace(CALL, content="I look it up.", reasoning_content=thoughts)
    messages = [ASKED, speaking, RESULT, *([ANSWER, MORE] if answered else [])]
    text = render(family, messages, tools=[FORECAST])
    said = [ASKED.content, "Reykjavik", RESULT.content]
    assert order(text, *said) == said
    assert text.count("I look it up.") == 1


@families
def test_a_tool_needs_no_words(family: str) -> None:
    bare = Tool("ping")
    call = Message("assistant", tool_calls=(ToolCall(ID, "ping", "{}"),))
    text = render(family, [SYSTEM, ASKED, call, RESULT], tools=[bare, FORECAST])
    assert text.count("ping") >= 2 and FORECAST.description in text
    assert [text.count(m.content) for m in (SYSTEM, ASKED, RESULT)] == [1, 1, 1]


@families
def test_calls_are_shown_where_no_tools_are_given_any_more(family: str) -> None:
    text = render(family, [SYSTEM, ASKED, CALL, RESULT, ANSWER, MORE])
    said = [ASKED.content, ARGUMENTS, RESULT.content, ANSWER.content, MORE.content]
    assert order(text, *said) == said and SYSTEM.content in text
    assert OWN.get(family, OURS).replace("{}", ARGUMENTS) in text
    assert FORECAST.description not in text


def test_where_llama_has_its_tools() -> None:
    for family in ("llama3.1", "llama3.2"):
        within = render(family, [SYSTEM, ASKED], tools=[FORECAST])
        above = render(
            family,
            [SYSTEM, ASKED],
            tools=[FORECAST],
            options={"tools_in_user_message": False},
        )
        said = [SYSTEM.content, FORECAST.description, ASKED.content]
        assert order(within, *said) == said
        assert order(above, *said) == [said[1], said[0], said[2]]


@families
@pytest.mark.parametrize(
    "said",
    ["{{ 7 * 7 }}", "{% if true %}x{% endif %}", "{# no #}", "<|im_end|>", "</s>[INST]"],
)
def test_what_looks_like_a_template_is_text(family: str, said: str) -> None:
    told = f"a {said} b"
    text = render(family, [Message("system", told), Message("user", f"c {told} d")])
    assert text.count(told) == 2 and f"c {told} d" in text and "49" not in text


@families
def test_what_looks_like_thoughts_is_text_where_the_user_says_it(family: str) -> None:
    asked = "What does <think>a</think> mean, and /no_think?"
    text = render(family, [SYSTEM, Message("user", asked), ANSWER, MORE])
    assert text.count(asked) == 1


class Letters:
    """A vocabulary whose tokens are the pieces that it is given, and whether control tokens are
    read in them."""

    bos, adds_bos = 1, True
    control_pattern = re.compile(r"<\|\w+\|>|</?s>|<｜[^｜]+｜>|<(?:start|end)_of_turn>")

    def token_text(self, token: int) -> str:
        return "<s>"

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        param: str = "prompt",
    ) -> Any:
        return [(text, parse_special)]


@families
def test_marks_that_are_said_are_text(family: str) -> None:
    said = "".join(re.findall(Letters.control_pattern, TURN[family])) or "</s>"
    messages = [SYSTEM, Message("user", f"What is {said}?"), CALL, replace(RESULT, content=said)]
    prompt = chat_prompt(
        Letters(),  # type: ignore[arg-type]
        template(family),
        messages,
        [replace(FORECAST, description=said)],
        {},
        lambda _: None,
        Files(None, {}, "", 4096),
    )
    tokens: Any = prompt.tokens
    assert "".join(t for t, is_read in tokens if not is_read) == said * 3
    assert "".join(t for t, _ in tokens).count(f"What is {said}?") == 1


@families
def test_a_begun_answer_ends_the_prompt(family: str) -> None:
    begun = Message("assistant", "In winter they")
    for messages in ([SYSTEM, ASKED, ANSWER, MORE], [SYSTEM, ASKED, CALL, RESULT]):
        text = render(family, [*messages, begun], tools=[FORECAST], continue_final=True)
        assert text.endswith("In winter they") and text.count("In winter they") == 1
        assert all(text.count(m.content) == 1 for m in messages if m.content)
