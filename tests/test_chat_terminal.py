"""`llmkit chat` at a terminal: a conversation, its commands, stopping, what a screen shows."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeClient, wait_for
from terminal import Script, chat, forever, said, shared_model, terminal

import llmkit
from llmkit.cli.terminal import stripped


@pytest.fixture
def running() -> Iterator[FakeClient]:
    with shared_model("theirs") as client:
        yield client


def test_a_conversation(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with (
        Script(said("Hel", "lo!"), said("Again."), said("More.")) as endpoint,
        terminal("chat", "--base-url", endpoint.url, "--system", "Be brief.") as shown,
    ):
        shown.expect(r"m\. /help.*>>> ")
        shown.send("hi\n")
        shown.expect(r"Hello!\r\n.*\(4 tokens.*\).*>>> ")
        shown.send("/sistem x\n")
        shown.expect(r"did you mean /system\?.*>>> ")
        shown.send("and?\n")
        shown.expect(r"Again\..*>>> ")
        assert [m["content"] for m in endpoint.asked[-1]["messages"]] == [
            "Be brief.", "hi", "Hello!", "and?",
        ]  # fmt: skip
        shown.send(f"/save {saved}\n")
        shown.expect(r"saved: .*>>> ")
        shown.send("/undo\n")
        shown.expect(r"taken back: and\?.*>>> ")
        shown.send("/clear\n")
        shown.expect(r">>> ")
        shown.send("/system Be long.\n")
        shown.expect(r">>> ")
        shown.send("so\n")
        shown.expect(r"More\..*>>> ")
        assert [m["content"] for m in endpoint.asked[-1]["messages"]] == ["Be long.", "so"]
        shown.send(f"/load {saved}\n")
        shown.expect(r"2 questions.*>>> ")
        shown.send("on\n")
        shown.expect(r"More\..*>>> ")
        assert len(endpoint.asked[-1]["messages"]) == 6
        shown.send("/help\n")
        shown.expect(r"/clear.*/exit.*>>> ")
        shown.send("\x04")
        assert shown.ended() == 0 and "Traceback" not in shown.text
    with llmkit.load("smollm2", n_ctx=256, n_slots=1, share=False) as llm:
        assert llm.session(path=saved).num_turns == 2


def test_commands_that_fail_change_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    with Script(said("ok")) as endpoint, terminal("chat", "--base-url", endpoint.url) as shown:
        shown.expect(">>> ")
        for line, words in (
            (f"/save {precious}", "no saved conversation"),
            ("/save", "name a file"),
            ("/save /nowhere/at/all.json", "No such file"),
            (f"/load {precious}", "not a saved session"),
            ("/load /nowhere.json", "No such file"),
            ("/load ~nobody-of-this-name/x", "nobody-of-this-name"),
            ("/undo", "nothing to take back"),
            ("/nonsense", "there is no command /nonsense"),
            ("/system", "no system message"),
        ):
            shown.send(line + "\n")
            shown.expect(re.escape(words) + r".*>>> ")
        assert endpoint.asked == [] and precious.read_text() == "mine"
        shown.send("/etc/hosts is what?\n")  # no command
        shown.expect(r"ok.*>>> ")
        shown.send(" /exit\n")
        shown.expect(r"ok.*>>> ")
        assert endpoint.asked[-1]["messages"][-1]["content"] == "/exit"
        shown.send("/exit\n")
        assert shown.ended() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    stop = threading.Event()
    with (
        Script(forever(stop), said("ok")) as endpoint,
        terminal("chat", "--base-url", endpoint.url) as shown,
    ):
        shown.expect(">>> ")
        shown.send("hi\n")
        shown.expect("word3 ")
        shown.interrupt()
        shown.expect(r"\(stopped\).*>>> ")
        assert stop.wait(30)
        shown.send("half a li")
        shown.expect("half a li")
        shown.interrupt()
        shown.expect(r"Ctrl-D.*>>> ")
        shown.send("next\n")
        shown.expect(r"ok.*>>> ")
        texts = [m["content"] for m in endpoint.asked[-1]["messages"]]
        assert texts[0] == "hi" and texts[1].startswith("word0 word1") and texts[2] == "next"
        for _ in range(5):
            shown.interrupt()
        shown.send("/exit\n/exit\n")  # the last stop may take a line along
        assert shown.ended() == 0


def test_the_stop_reaches_the_model(running: FakeClient) -> None:
    running.runner.step_s = 0.02
    with terminal("chat") as shown:
        shown.expect("theirs.*>>> ")
        shown.send("hi\n")
        wait_for(lambda: running.stats().num_running == 1)
        shown.expect(r"hi\r\n.*[a-z]{3}")
        shown.interrupt()
        shown.expect(r"\(stopped\).*>>> ")
        wait_for(lambda: running.stats().num_running == 0)
        shown.send("\x04")
        assert shown.ended() == 0


def test_several_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("secret")
    with Script(said("ok")) as endpoint, terminal("chat", "--base-url", endpoint.url) as shown:
        shown.expect(">>> ")
        shown.send('"""first\n')
        shown.expect(r"\.\.\. ")
        shown.send(f"@{tmp_path}/x.txt\n")
        shown.expect(r"\.\.\. ")
        shown.send('/exit"""\n')
        shown.expect(r"ok.*>>> ")
        text = f"first\n@{tmp_path}/x.txt\n/exit"  # neither a file nor a command
        assert endpoint.asked[-1]["messages"][-1]["content"] == text
        shown.send('/system """one\n')
        shown.expect(r"\.\.\. ")
        shown.send('two"""\n')
        shown.expect(r"is set.*>>> ")
        shown.send(f"\x1b[200~pasted\n@{tmp_path}/x.txt\x1b[201~\n")
        shown.expect(r"ok.*>>> ")
        messages = endpoint.asked[-1]["messages"]
        assert messages[0]["content"] == "one\ntwo"
        assert messages[-1]["content"] == f"pasted\n@{tmp_path}/x.txt"
        shown.send('"""never ended\n')
        shown.expect(r"\.\.\. ")
        shown.interrupt()
        shown.expect(r">>> ")
        shown.send(f"typed @{tmp_path}/x.txt\n")
        shown.expect(r"with x\.txt.*ok.*>>> ")
        assert "secret" in endpoint.asked[-1]["messages"][-1]["content"]
        shown.send("\x04")
        assert shown.ended() == 0


def test_a_failed_answer_leaves_the_conversation(running: FakeClient) -> None:
    with terminal("chat", "--max-tokens", "5") as shown:
        shown.expect(">>> ")
        shown.send("hi\n")
        shown.expect(r"\(5 tokens.*>>> ")
        shown.send("x" * 3000 + "\n")  # some terminals take no more at once
        shown.expect(r"\(5 tokens.*>>> ")
        shown.send("y" * 3000 + "\n")
        shown.expect(r"context is 4000 tokens.*/clear or /undo.*>>> ")
        shown.send("/undo\n")
        shown.expect(">>> ")
        shown.send("z\n")
        answer = shown.expect(r"\(5 tokens.*>>> ")
        assert "context is" not in answer[0]
    assert running.stats().requests_total == 3, "the one that was too long was not computed"


def test_reasoning_is_dimmed_and_only_for_people() -> None:
    with Script(said("42", reasoning="Let me think.")) as endpoint:
        assert chat("hi", "-m", "m", "--base-url", endpoint.url).stdout == "42\n"
        args = ("chat", "hi", "-m", "m", "--base-url", endpoint.url)
        with terminal(*args) as shown:
            assert shown.ended() == 0
            assert "\x1b[2mLet me think.\r\n\x1b[0m42\r\n" in shown.text
            assert "(4 tokens" in shown.text
        for more in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            with terminal(*args, **more) as shown:
                assert shown.ended() == 0 and "\x1b" not in shown.text
                assert "(thinking) Let me think.\r\n42\r\n" in shown.text


def test_a_model_cannot_write_elsewhere_on_the_screen() -> None:
    hostile = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2J\rc\x9b1Ad\te\x7f"
    with Script(said(*hostile)) as endpoint:
        args = ("hi", "-m", "m", "--base-url", endpoint.url)
        assert chat(*args).stdout == hostile.replace("\r", "\n") + "\n"  # text mode reads \r so
        with terminal("chat", *args, NO_COLOR="1") as shown:
            assert shown.ended() == 0
            assert "a]52;c;ZXZpbA==b[2Jc1Ad" in shown.text
            assert not set(shown.text) & {"\x1b", "\x07", "\x9b", "\x7f"}
    assert stripped("\x00a\nb") == "a\nb"


@pytest.mark.parametrize("columns", [1, 10, 40])
def test_narrow_terminals_and_wide_characters(columns: int) -> None:
    text = "日本語とemoji 👩‍👩‍👧 und Umlaute äöü\n"
    with Script(said(*text)) as endpoint:
        args = ("chat", "--base-url", endpoint.url)
        with terminal(*args, columns=columns) as shown:
            shown.expect(">>> ")
            shown.send("漢字?\n")
            shown.expect(r"\(4 tokens")
            assert text.strip() in shown.text
            assert endpoint.asked[-1]["messages"][-1]["content"] == "漢字?"
            shown.expect(">>> ")
            shown.send("\x04")
            assert shown.ended() == 0


def test_a_terminal_that_knows_only_ascii() -> None:
    with Script(said("äöü 漢")) as endpoint:
        args = ("hi", "-m", "m", "--base-url", endpoint.url)
        done = chat(*args, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stdout, done.stderr) == (0, "??? ?\n", "")


def test_invalid_bytes_typed_are_sent_as_question_marks() -> None:
    with (
        Script(said("ok")) as endpoint,
        terminal("chat", "--base-url", endpoint.url, TERM="dumb") as shown,
    ):
        shown.expect(">>> ")
        os.write(shown._fd, b"a\xffb\n")
        shown.expect(r"ok.*>>> ")
        sent = endpoint.asked[-1]["messages"][-1]["content"]
    assert sent.startswith("a") and sent.endswith("b") and "\udcff" not in sent
