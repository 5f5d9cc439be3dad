"""`llm.session(id=...)` and `llmkit chat --session`: conversations that last."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient
from terminal import Script, chat, shared_model, terminal
from terminal import said as said_by

from llmkit.errors import ConflictError, InvalidRequestError, NotFoundError, StoreError
from llmkit.gateway.access.identity import LOCAL
from llmkit.llm import LLM
from llmkit.protocol import Message
from llmkit.sessions.conversation import LOCAL_OWNER, open_store
from llmkit.sessions.running import Interrupted
from llmkit.sessions.session import Session
from llmkit.store.conversations import ConversationStore

REFUSED: tuple[int, dict[str, str], bytes] = (500, {}, b"{}")


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setenv("LLMKIT_DB_URL", f"sqlite:///{tmp_path}/llmkit.db")
    client = FakeClient("fake", FakeRunner(n_ctx=4096))
    handle = LLM(client)
    yield handle
    handle.unload()


@pytest.fixture
def store(llm: LLM) -> Iterator[ConversationStore]:
    opened = open_store()
    yield opened
    opened.database.close()


def said(session: Session) -> list[str]:
    return [m.text for m in session.messages]


def stored(store: ConversationStore, session: Session) -> list[str]:
    assert session.id is not None
    return [m.text for m in store.path(LOCAL_OWNER, session.id)]


def test_it_goes_on_by_name_and_by_id(llm: LLM, store: ConversationStore) -> None:
    assert LOCAL.name == LOCAL_OWNER, "the same caller as at a gateway without keys"
    session = llm.session("Be brief.", id="fruit", temperature=0, max_tokens=5)
    first = session.say("Name one.")
    assert stored(store, session) == ["Be brief.", "Name one.", first.text] == said(session)
    reply = store.path("local", session.id or "")[-1]
    assert (reply.status, reply.finish_reason, reply.model) == ("complete", "length", "fake")
    assert reply.usage and reply.usage["completion_tokens"] == 5
    again = llm.session(id="fruit")
    assert again.id == session.id and again.messages == session.messages
    assert again.sampling == {"temperature": 0, "max_tokens": 5}
    again.say("Another.")
    by_id = llm.session(id=session.id, max_tokens=3)
    assert by_id.messages == again.messages and by_id.sampling["max_tokens"] == 3
    other = llm.session(id="animal")
    assert other.id != session.id and not other.messages
    theirs = store.create("user ann", messages=[Message("user", "hi")])
    assert said(llm.session(id=theirs.id)) == ["hi"], "who has the database may read all of it"
    with pytest.raises(NotFoundError):
        llm.session(id="sess_" + "0" * 24)
    for wrong in ({"id": " "}, {"id": 5}, {"id": "a", "path": "b"}):
        with pytest.raises(InvalidRequestError):
            llm.session(**wrong)


def test_fork_undo_trim_regenerate(llm: LLM, store: ConversationStore) -> None:
    session = llm.session("s", id="x", max_tokens=4, temperature=0)
    for i in range(4):
        session.say(f"q{i}")
    full = session.messages[:]
    fork = session.fork()
    assert fork.id != session.id and stored(store, fork) == said(session)
    fork.say("aside")
    assert stored(store, session) == said(session)
    session.undo()
    assert stored(store, session) == said(session) == [m.text for m in full[:-2]]
    session.say("q3")
    tree = store.messages("local", session.id or "")
    assert len([m for m in tree if m.text == "q3"]) == 1, "an answer beside the other"
    assert len([m for m in tree if m.parent_id == tree[-1].parent_id]) == 2
    session.regenerate()
    assert len([m for m in store.messages("local", session.id or "") if m.text == "q3"]) == 1
    assert stored(store, session) == said(session)
    assert 1 <= session.trim(session.num_tokens // 2) < 4
    assert stored(store, session) == said(session) and said(session)[0] == "s"
    count = len(store.messages("local", session.id or ""))
    session.messages = full
    session.commit()
    assert stored(store, session) == [m.text for m in full]
    assert len(store.messages("local", session.id or "")) == count, "known messages are found"
    loose = session.fork(stored=False)
    loose.say("nowhere")
    assert loose.id is None and stored(store, session) == said(session)
    session.messages[-1] = Message("assistant", "mine")
    session.say("and?")
    assert stored(store, session)[-3] == "mine"


def test_what_no_database_holds(llm: LLM, store: ConversationStore) -> None:
    session = llm.session(id="x", temperature=0, max_tokens=3)
    session.say("a\0b")
    session.say("c")
    assert stored(store, session)[0] == "a\ufffdb" and said(session)[0] == "a\0b"
    assert len(store.messages("local", session.id or "")) == 4, "it is known again"


def test_what_is_interrupted_is_kept_and_what_fails_is_not(
    llm: LLM, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = llm.session(id="x", temperature=0)
    llm.engine.runner.step_s = 0.1  # type: ignore[attr-defined]  # it ends long after the break
    for _ in session.stream("long", max_tokens=500):
        break
    llm.engine.runner.step_s = 0.0  # type: ignore[attr-defined]
    reply = store.path("local", session.id or "")[-1]
    assert reply.status == "partial" and reply.text == said(session)[-1] != ""
    before = said(session)
    with pytest.raises(InvalidRequestError):
        session.say("x" * 5000)
    with pytest.raises(InvalidRequestError):
        session.say("x", temperature=-1)
    assert stored(store, session) == before == said(session)
    turn = session.stream("fails", max_tokens=50)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no reader")

    monkeypatch.setattr(turn._reader, "read", broken)
    with pytest.raises(RuntimeError):
        list(turn)
    assert said(session) == before == stored(store, session)
    session.say("fails", max_tokens=3)
    assert stored(store, session) == said(session)


def test_each_second_is_kept(
    llm: LLM, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.sessions.conversation.CHECKPOINT_S", 0.0)
    session = llm.session(id="x", temperature=0)
    runner: Any = llm.engine.runner  # type: ignore[attr-defined]
    go_on, execute = threading.Semaphore(1), runner.execute
    monkeypatch.setattr(runner, "execute", lambda b: (go_on.acquire(timeout=1), execute(b))[1])
    seen = []
    for piece in session.stream("q", max_tokens=20):
        running = store.path("local", session.id or "")[-1]
        seen.append(running.text)
        assert piece and running.status == "running"
        go_on.release()  # the next token comes when this one was seen
    assert seen[-1].startswith(seen[0]) and len(seen[-1]) > len(seen[0])


@pytest.mark.parametrize("stays", [True, False], ids=["held", "dropped"])
def test_a_turn_that_nobody_reads_leaves_nothing(
    llm: LLM, store: ConversationStore, stays: bool
) -> None:
    session = llm.session(id="x", temperature=0, max_tokens=3)
    turns = [session.stream("unread")]
    if not stays:
        turns.clear()
    session.say("hi")
    assert stored(store, session) == said(session) and said(session)[0] == "hi"
    for turn in turns:
        turn.close()
        list(turn)
    assert stored(store, session) == said(session) and len(session) == 2
    assert len(store.messages("local", session.id or "")) == 2


@pytest.mark.parametrize("when", ["begin_turn", "end_reply"])
def test_the_stop_button_leaves_no_answer_open(
    llm: LLM, store: ConversationStore, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    session = llm.session(id="x", temperature=0, max_tokens=3)
    session.say("hi")
    real, presses = getattr(ConversationStore, when), [signal.SIGINT]

    def stopped(*given: Any, **more: Any) -> Any:
        for pressed in presses:
            signal.raise_signal(pressed)
        made = real(*given, **more)
        while presses:
            signal.raise_signal(presses.pop())
        return made

    monkeypatch.setattr(ConversationStore, when, stopped)
    with pytest.raises(Interrupted, match="so far is in the session"):
        session.say("again")
    session.say("and again")
    assert stored(store, session) == said(session) and len(session) == 6


def test_the_panels_buttons_are_kept(
    llm: LLM, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = llm.chat_panel(session=llm.session("s", id="x", temperature=0, max_tokens=3))
    for text in ("one", "two"):
        panel.send(text)
        panel.wait(30)
    assert stored(store, panel.session) == said(panel.session) and len(panel.session) == 5
    assert panel.edit() == "two"
    assert stored(store, panel.session) == said(panel.session) and len(panel.session) == 3
    panel._repr_mimebundle_()
    with monkeypatch.context() as patch:
        for button in (panel.edit, panel.clear):

            def full(*_: Any, **__: Any) -> Any:
                raise StoreError("the disk is full")

            patch.setattr(ConversationStore, "change", full)
            button()
            assert "the disk is full" in panel._widgets["coming"].value  # type: ignore[index]
    panel.clear()
    assert "disk" not in panel._widgets["coming"].value  # type: ignore[index]
    assert stored(store, panel.session) == said(panel.session) == ["s"]


def test_two_at_once(llm: LLM) -> None:
    one = llm.session(id="x", temperature=0, max_tokens=3)
    one.say("hi")
    two = llm.session(id=one.id)
    turn = iter(one.stream("first"))
    next(turn)
    with pytest.raises(ConflictError, match=r"is being written at this point.*in a fork"):
        two.say("second")
    refused = two.stream("third")
    with pytest.raises(ConflictError):
        list(refused)
    refused.close()
    assert len(two) == 2
    list(turn)
    two.say("second")
    assert len(one) == len(two) == 4
    three = llm.session(id=one.id)
    assert said(three)[-2] == "second", "the branch that was said last"


def test_a_locked_database_loses_nothing(
    llm: LLM, store: ConversationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = llm.session(id="x", temperature=0, max_tokens=5)
    session.say("one")
    engine = llm._answers._store.database.engine  # type: ignore[union-attr]
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=50")
    other = sqlite3.connect(tmp_path / "llmkit.db", isolation_level=None)
    turn = iter(session.stream("two"))
    next(turn)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program holds it"):
        list(turn)
    assert said(session)[-2] == "two", "it is in memory"
    with pytest.raises(StoreError):
        session.say("three")
    other.execute("ROLLBACK")
    other.close()
    assert stored(store, session)[-1] == ""
    session.say("four")
    assert stored(store, session) == said(session) and said(session)[-2] == "four"


class TestCommand:
    """`llmkit chat --session`."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConversationStore]:
        monkeypatch.setenv("LLMKIT_DB_URL", f"sqlite:///{tmp_path}/llmkit.db")
        opened = open_store()
        yield opened
        opened.database.close()

    def test_questions_one_by_one(self, place: ConversationStore) -> None:
        with shared_model("theirs"):
            for text in ("one", "two"):
                done = chat(text, "--session", "notes", "--max-tokens", "3", "--temperature", "0")
                assert (done.returncode, done.stderr) == (0, "")
            known = place.titled("local", "notes")
            assert known is not None
            path = place.path("local", known.id)
            assert [m.role for m in path] == ["user", "assistant"] * 2
            assert path[-1].text == done.stdout.strip() and path[2].text == "two"
            done = chat("three", "--session", known.id, "--system", "Be kind.")
            assert done.returncode == 0
            roles = [m.role for m in place.path("local", known.id)]
            assert roles == ["system", *["user", "assistant"] * 3]
            done = chat("x", "--session", "sess_" + "0" * 24)
            assert done.returncode == 1 and "there is no session" in done.stderr
        assert len(place.list("local")) == 1

    def test_any_endpoint(self, place: ConversationStore) -> None:
        with Script(said_by("Hel", "lo!"), said_by("Again.", reasoning="hm"), REFUSED) as endpoint:
            address = ["--base-url", endpoint.url, "--model", "m", "--session", "notes"]
            assert chat("one", *address).returncode == 0
            assert chat("two", *address).returncode == 0
            sent = [m["content"] for m in endpoint.asked[-1]["messages"]]
            assert sent == ["one", "Hello!", "two"]
            assert chat("three", *address).returncode == 1, "the endpoint has nothing more to say"
        known = place.titled("local", "notes")
        assert known is not None
        path = place.path("local", known.id)
        assert [m.text for m in path] == ["one", "Hello!", "two", "Again."]
        assert path[-1].reasoning == "hm" and path[-1].finish_reason == "stop"
        assert path[-1].model == "m" and path[1].usage is not None
        assert len(place.messages("local", known.id)) == 4, "what failed left nothing"

    def test_at_a_terminal(self, place: ConversationStore) -> None:
        with Script(said_by("One."), said_by("Two.")) as endpoint:
            address = ["chat", "--base-url", endpoint.url, "-m", "m", "--session", "notes"]
            with terminal(*address) as shown:
                shown.expect(">>> ")
                shown.send("first\n")
                shown.expect("One.")
                shown.expect(">>> ")
                shown.send("second\n")
                shown.expect("Two.")
                shown.expect(">>> ")
                shown.send("/undo\n")
                shown.expect("taken back: second")
                shown.send("/exit\n")
                assert shown.ended() == 0
            known = place.titled("local", "notes")
            assert known is not None
            assert [m.text for m in place.path("local", known.id)] == ["first", "One."]
            with terminal(*address) as shown:
                shown.expect("a conversation of 1 question")
                shown.send("/exit\n")
                assert shown.ended() == 0
