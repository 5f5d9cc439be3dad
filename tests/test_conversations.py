"""Sessions, tables and magics, on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fakes import interrupt_after
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from pydantic import BaseModel

import llmkit
from llmkit.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from llmkit.notebook.display import conversation_html
from llmkit.notebook.magics import COMMANDS, complete
from llmkit.sessions.session import Interrupted, Session

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=512, n_slots=4, share=False)
    yield handle
    handle.unload()


@pytest.fixture
def session(llm: llmkit.LLM) -> Session:
    return llm.session("Answer briefly.", temperature=0, max_tokens=12)


def roles(session: Session) -> list[str]:
    return [m.role for m in session.messages]


def test_a_session_remembers_and_computes_only_what_is_new(session: Session) -> None:
    first = session.say("Name a fruit.")
    second = session.say("Name another.")
    assert (
        roles(session) == ["system", "user", "assistant", "user", "assistant"]
        and session.messages[2].content == first.text
    )
    assert (
        second.usage.cached_tokens > first.usage.prompt_tokens
        and session.num_turns == 2
        and session.num_tokens > second.usage.prompt_tokens
    )


def test_a_fork_goes_its_own_way(session: Session) -> None:
    session.say("Name a fruit.")
    other = session.fork()
    other.say("Name an animal.")
    assert len(session) == 3 and len(other) == 5 and other.messages[:3] == session.messages
    other.undo()
    assert other.messages == session.messages
    session.say("Name a tree.")
    told = session.messages[:]
    with pytest.raises(InvalidRequestError):
        session.regenerate(temperature=-1)
    assert session.messages == told, "what failed changes nothing"
    session.undo()
    again = session.regenerate(temperature=1, seed=3)
    assert len(session) == 3 and session.messages[-1].content == again.text


def test_what_is_saved_goes_on(session: Session, llm: llmkit.LLM, tmp_path: Path) -> None:
    session.say("Name a fruit: ä")
    path = session.save(tmp_path / "s.json")
    other = llm.session(path=path)
    assert other.messages == session.messages and other.sampling == session.sampling
    assert other.say("And?").text == session.say("And?").text
    assert llm.session("Be rude.", path=path).messages[0].content == "Be rude."
    for text in (
        "",
        "[]",
        '{"format": "other"}',
        json.dumps(
            {"format": "llmkit-session", "version": 1, "sampling": {}, "messages": [{"x": 1}]}
        ),
    ):
        path.write_text(text)
        with pytest.raises(InvalidRequestError, match="not a saved session"):
            llm.session(path=path)
    with pytest.raises(FileNotFoundError):
        llm.session(path=tmp_path / "none.json")


def test_trim_forgets_the_oldest(session: Session) -> None:
    for i in range(6):
        session.say(f"Say the number {i} and a word.")
    before = session.num_tokens
    assert session.trim(before // 2) >= 2 and session.num_tokens <= before // 2
    assert (
        roles(session)[:2] == ["system", "user"]
        and session.messages[-2].content == "Say the number 5 and a word."
    )
    assert session.trim(1) and session.num_turns == 1, "the newest turn stays"


def test_a_failed_turn_leaves_no_trace_and_a_left_one_stays(
    session: Session, llm: llmkit.LLM
) -> None:
    with pytest.raises(ContextLengthError):
        session.say("x " * 2000)
    with pytest.raises(InvalidRequestError):
        session.say("  ")
    assert roles(session) == ["system"]
    for _ in session.stream("Tell me a long story.", max_tokens=300):
        break
    assert roles(session) == ["system", "user", "assistant"] and session.messages[-1].content
    interrupt_after(llm, 15)
    with pytest.raises(Interrupted, match="in the session"):
        session.say("Another long one.", max_tokens=400, ignore_eos=True)
    assert session.num_turns == 2 and len(session.messages[-1].content) > 5
    session.messages[-1] = llmkit.Message("assistant", "<b>&")
    assert "&lt;b&gt;&amp;" in conversation_html(session.messages) and "assistant: <b>&" in repr(
        session
    )


def test_a_table_is_answered_row_by_row(llm: llmkit.LLM) -> None:
    table = pd.DataFrame({"animal": ["cat", None, "x " * 2000, "bee"]}, index=[5, 6, 7, 8])
    found = llm.map(table, "A fact about the {animal}.", max_tokens=8, temperature=0)
    assert (
        list(found.index) == [5, 6, 7, 8]
        and "answer" not in table
        and list(found.columns) == ["animal", "answer", "answer_error"]
    )
    assert (
        found.answer[5] == llm.chat("A fact about the cat.", max_tokens=8, temperature=0).text
        and found.answer[8]
    )
    assert (
        "empty in this row" in found.answer_error[6]
        and "context" in found.answer_error[7]
        and found.answer.isna().sum() == 2
    )
    by_function = llm.map(
        table.animal, lambda row: f"{row.animal[:3]}", into="said", chat=False, max_tokens=3
    )
    assert by_function.said_error.notna().sum() == 1 and "TypeError" in by_function.said_error[6]
    for bad in ("{nope}", "{0}", "{animal", "{animal.x}"):
        with pytest.raises(InvalidRequestError, match="template"):
            llm.map(table, bad)
    assert llm.map(table[:0], "{animal}").empty and len(llm.last_batch) == 0


def test_shapes(llm: llmkit.LLM) -> None:
    class Point(BaseModel):
        x: int
        y: bool

    assert Point.model_validate_json(
        llm.generate("A point as JSON: ", json_schema=Point, max_tokens=60, temperature=0).text
    )
    assert (
        llm.chat("Yes or no?", choice=["yes", "no"]).text in ("yes", "no")
        and llm.generate("In the year ", regex="[0-9]{4}").text.isdigit()
    )
    for bad in (
        {"choice": []},
        {"choice": "yes"},
        {"json_schema": 5},
        {"regex": "a", "choice": ["a"]},
        {"json_schema": {"a": {1}}},
    ):
        with pytest.raises(InvalidRequestError):
            llm.generate("x", **bad)


def test_models_by_name(llm: llmkit.LLM) -> None:
    models: Any = llmkit.models
    assert (
        models["smollm2"] is llm
        and "smollm2" in models
        and list(models) == models._ipython_key_completions_() == ["smollm2"]
        and len(models) == 1
    )
    assert repr(models) == repr(llm)
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        models["other"]


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "llmkit")
    yield shell
    InteractiveShell.clear_instance()


def test_magics(
    llm: llmkit.LLM, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        shell.run_line_magic("llm", "load smollm2 --n-ctx 512 --n-slots 4 --as mine") is llm
        and shell.user_ns["mine"] is llm
    )
    shell.user_ns["topic"], shell.user_ns["row"] = "cats", {"a": ["dogs"]}
    shell.run_cell_magic(
        "llm",
        '-n 8 -t 0 -s "Be brief." -o answer',
        'About {topic} and {row[a][0]}: {"json": 1} {{x}} {missing} {topic:.2f} }}',
    )
    said = capsys.readouterr().out
    expected = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": 'About cats and dogs: {"json": 1} {{x}} {missing} {topic:.2f} }}',
        },
    ]
    assert (
        shell.user_ns["answer"].text.strip()
        == said.strip()
        == llm.chat(expected, max_tokens=8, temperature=0).text.strip()
    )
    for line, word in (
        ("list", "* LLM("),
        ("status", "requests"),
        ("--help", "COMMAND"),
        ("load --help", "--n-ctx"),
    ):
        shell.run_line_magic("llm", line)
        assert word in capsys.readouterr().out
    assert (
        "fits" in repr(shell.run_line_magic("llm", "estimate smollm2")).lower()
        or shell.run_line_magic("llm", "estimate smollm2") is not None
    )


@pytest.mark.parametrize(
    ("line", "cell", "word"),
    [
        ("use nobody", None, "nobody"),
        ("frobnicate", None, "invalid choice"),
        ("load nowhere.gguf", None, "nowhere.gguf"),
        ("load 'x", None, "quotation"),
        ("-n many", "x", "invalid int"),
        ("", "   ", "empty"),
        ("-n 0 -t -1", "x", "temperature"),
    ],
)
def test_magics_say_what_is_wrong(
    llm: llmkit.LLM, shell: InteractiveShell, line: str, cell: str | None, word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        shell.run_line_magic("llm", line) if cell is None else shell.run_cell_magic(
            "llm", line, cell
        )


def test_completion(llm: llmkit.LLM) -> None:
    class Event:
        def __init__(self, line: str) -> None:
            self.line = line

    assert complete(None, Event("%llm ")) == list(COMMANDS) == complete(None, Event("%llm lo"))
    assert "smollm2" in complete(None, Event("%llm load ")) and complete(
        None, Event("%llm use s")
    ) == ["smollm2"]
