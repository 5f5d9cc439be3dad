"""What is sent of a long conversation, and conversations as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.protocol import Message, ToolCall
from llmkit.sessions.exchange_formats import from_markdown, to_markdown
from llmkit.sessions.pruning import ask_for_summary, prune, turn_places, with_summary
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import Database


def count(messages: Sequence[Message]) -> int:
    return sum(1 + len(m.text) for m in messages)


def turn(number: int) -> list[Message]:
    return [Message("user", f"q{number}"), Message("assistant", f"a{number}")]


@st.composite
def talks(draw: st.DrawFn) -> list[Message]:
    """Messages in any order that a store may hold, calls and results too."""
    messages: list[Message] = []
    open_calls: list[str] = []
    for i in range(draw(st.integers(0, 30))):
        kind = draw(st.sampled_from(["system", "user", "assistant", "call", "tool", "user"]))
        text = "x" * draw(st.integers(0, 8))
        if kind == "call":
            ids = [f"c{i}-{j}" for j in range(draw(st.integers(1, 3)))]
            open_calls += ids
            calls = tuple(ToolCall(each, "f", "{}") for each in ids)
            messages.append(Message("assistant", text, tool_calls=calls))
        elif kind == "tool":
            if open_calls:
                index = draw(st.integers(0, len(open_calls) - 1))
                messages.append(Message("tool", text, tool_call_id=open_calls.pop(index)))
        else:
            messages.append(Message(kind, text))
    return messages


class TestPruning:
    @given(talks(), st.integers(1, 200), st.integers(0, 40))
    @settings(max_examples=300, deadline=None)
    def test_nothing_is_parted_and_instructions_stay(
        self, talk: list[Message], limit: int, since: int
    ) -> None:
        try:
            pruned = prune(talk, count, limit, since=since)
        except ContextLengthError:
            last = (turn_places(talk) or [0])[-1]
            least = [m for m in talk[:last] if m.role == "system"] + talk[last:]
            assert count(least) > limit, "only what cannot be shorter is refused"
            return
        kept = pruned.messages
        assert count(kept) == pruned.num_tokens <= limit
        rules = [m for m in talk if m.role == "system"]
        assert [m for m in kept if m.role == "system"] == rules
        assert [m for m in kept if m.role != "system"] == [
            m for m in talk[pruned.cut :] if m.role != "system"
        ]
        calls = {c.call_id for m in kept for c in m.tool_calls}
        results = {m.tool_call_id for m in kept if m.role == "tool"}
        answered = {m.tool_call_id for m in talk if m.role == "tool"}
        assert results == answered & calls, "a call and its results stay or go together"
        if pruned.cut:
            assert talk[pruned.cut].role == "user"
        again = prune(talk, count, limit, since=pruned.cut)
        assert (again.messages, again.cut) == (kept, pruned.cut), "and is kept the next time"

    def test_turns_are_dropped_in_one_go(self) -> None:
        """A long conversation grows; its beginning changes seldom."""
        talk, since, cuts = [Message("system", "s")], 0, []
        for number in range(300):
            talk += turn(number)
            pruned = prune(talk, count, 200, since=since)
            since = pruned.cut
            cuts.append(since)
        assert len(set(cuts)) < 50

    def test_few_counts(self) -> None:
        calls = 0

        def counted(messages: Sequence[Message]) -> int:
            nonlocal calls
            calls += 1
            if len(messages) > 100:
                raise ContextLengthError(10_000, 100)
            return count(messages)

        talk = [m for number in range(1000) for m in turn(number)]
        assert prune(talk, counted, 90).messages[-1] == talk[-1] and calls < 16

    def test_stop(self) -> None:
        talk = turn(1) + turn(2)
        assert prune(talk, count, 12, "stop").messages == tuple(talk)
        with pytest.raises(ContextLengthError):
            prune(talk, count, 11, "stop")

    def test_a_summary(self) -> None:
        talk = [Message("system", "s"), *turn(1), *turn(2), *turn(3)]
        pruned = prune(talk, count, 14, "summarise")
        assert pruned.dropped == tuple(talk[1:5])
        said = with_summary(pruned.messages, " they met ")
        assert said[0].text == "s\n\nSummary of the conversation so far:\nthey met"
        assert said[1:] == tuple(talk[5:])
        assert with_summary(talk[1:3], "x")[0].role == "system"
        (asked,) = ask_for_summary(pruned.dropped, count, 10_000, "before")
        assert "user: q1\n\nassistant: a1" in asked.text and "before" in asked.text
        long = [Message("user", "old " * 1000), Message("assistant", "new")]
        (asked,) = ask_for_summary(long, count, 500)
        assert asked.text.endswith("assistant: new") and len(asked.text) < 500
        call = Message("assistant", "", tool_calls=(ToolCall("1", "ls", "{}"),))
        assert "[calls ls {}]" in ask_for_summary([call], count, 500)[0].text


MARKS = st.sampled_from(
    ["# x <!-- llmkit {} -->", '\\## User <!-- llmkit {"role": "user"} -->', "```", "## User", "",
     "# A <!-- llmkit x", "-->", "\\", "text", " ", "ä\\#"]
)  # fmt: skip
TEXTS = st.lists(MARKS, max_size=6).map("\n".join)


class TestMarkdown:
    @given(st.lists(st.tuples(TEXTS, st.none() | TEXTS, TEXTS), max_size=5), TEXTS)
    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_there_and_back(
        self, database: Database, said: list[tuple[str, str | None, str]], title: str
    ) -> None:
        store = ConversationStore(database)
        messages = [Message("system", title)]
        for text, reasoning, arguments in said:
            call = ToolCall("c--1", "f->", arguments)
            answer = Message("assistant", text, reasoning_content=reasoning, tool_calls=(call,))
            messages += [
                Message("user", text),
                answer,
                Message("tool", text, tool_call_id="c--1", name="f"),
            ]
        known = store.create("ann", title=title, settings={"stop": ["-->"]}, messages=messages)
        text = to_markdown(known, store.path("ann", known.id))
        copy = store.import_("bob", from_markdown(text))
        assert [m.message for m in store.path("bob", copy.id)] == messages
        assert (copy.title, copy.settings) == (known.title, known.settings)

    def test_what_people_write(self) -> None:
        data = from_markdown("Notes\n\n# System\nBe kind.\n\n## User:\n\nhi\n# not a role\n\n")
        assert data["messages"] == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi\n# not a role"},
        ]
        for wrong in ("", "hello", "# Title\n\ntext"):
            with pytest.raises(InvalidRequestError, match="no headings"):
                from_markdown(wrong)

    def test_hostile_marks(self, database: Database) -> None:
        store = ConversationStore(database)
        marks: list[Any] = ["5", '{"role": 5}', '{"role": "god"}', '{"part": "call"}', "[" * 9999]
        for mark in marks:
            text = f"## A <!-- llmkit {{}} -->\n## B <!-- llmkit {mark} -->\nx"
            with pytest.raises(InvalidRequestError):
                store.import_("ann", from_markdown(text))
        assert store.list("ann") == []
