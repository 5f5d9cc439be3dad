"""`llmkit chat` and `llmkit run`: at a terminal, in a pipe, with any endpoint."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient
from gateway_client import Api
from terminal import LLMKIT, Script, chat, chunk, forever, said, shared_model

import llmkit
from llmkit.bridge.server import BridgeServer
from llmkit.cli.attachments import question_of, taken_apart
from llmkit.cli.endpoint import Endpoint
from llmkit.errors import InvalidRequestError


@pytest.fixture
def running() -> Iterator[FakeClient]:
    with shared_model("theirs") as client:
        yield client


# One question


@pytest.mark.usefixtures("running")
def test_one_question_prints_the_answer_and_nothing_else() -> None:
    done = chat("hi", "there", "--max-tokens", "12", "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[a-z]{12}\n", done.stdout)
    again = chat("--json", "hi there", "--max-tokens", "12", "--temperature", "0")
    answer = json.loads(again.stdout)
    assert answer["answer"] + "\n" == done.stdout and answer["model"] == "theirs"
    assert answer["usage"]["completion_tokens"] == 12 and answer["finish_reason"] == "length"


def test_the_newest_model_that_chats_is_taken(running: FakeClient) -> None:
    from dataclasses import replace

    vectors = FakeClient("vectors")
    vectors.description = replace(vectors.description, embedding_size=4, created=2**40)
    bridge = BridgeServer(vectors)
    answer = json.loads(chat("hi", "--json", "--max-tokens", "3").stdout)
    assert answer["model"] == "theirs"
    refused = chat("hi", "--model", "vectors")
    assert refused.returncode == 1 and "cannot chat" in refused.stderr
    bridge.close()
    vectors.close()


@pytest.mark.model
def test_without_any_model_smollm2_is_loaded() -> None:
    done = chat("Say hello.", "--max-tokens", "5", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.strip(), done
    assert done.stderr == "llmkit: no model of yours is running; loading smollm2\n"


@pytest.mark.model
def test_run_loads_and_answers(private_runtime: Path) -> None:
    options = ["--max-tokens", "8", "--temperature", "0", "--n-ctx", "512", "--n-slots", "1"]
    done = chat("smollm2", "Say hello.", *options, command="run")
    with llmkit.load("smollm2", n_ctx=512, n_slots=1, share=False) as llm:
        expected = llm.chat("Say hello.", max_tokens=8, temperature=0).text
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.rstrip("\n") + "\n", "")
    assert list(private_runtime.iterdir()) == []  # nothing of it stays


def test_what_cannot_be_asked_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    for args, code, words in (
        ([], 2, "there is no question"),
        (["x", "--temperature", "-3"], 1, "temperature"),
        (["x", "--max-tokens", "-1"], 1, "max_tokens"),
        (["x", "--file", str(tmp_path / "none.txt")], 1, "No such file"),
        (["x", "--file", str(tmp_path)], 1, "directory"),
        (["x", "--base-url", "127.0.0.1:3000"], 1, "http://127.0.0.1:3000/v1"),
        (["x", "--base-url", "http://[::1"], 1, "address"),
        (["x", "--base-url", "http://h/v1", "--api-key", "a\nb"], 1, "key"),
        (["x", "--nonsense"], 2, "--nonsense"),
    ):
        done = chat(*args)
        assert done.returncode == code and words in done.stderr, (args, done)
        assert "Traceback" not in done.stderr and not done.stdout


# Files and pipes


def test_files_and_pipes_go_with_the_question(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n```\n")
    (tmp_path / "b c.txt").write_text("\ufeffhello\r\nthere")
    with Script(said("ok")) as endpoint:
        done = chat(
            f'What is @{tmp_path}/a.py, and @"{tmp_path}/b c.txt"? Ask \\@me or @nobody.',
            "--file",
            str(tmp_path / "a.py"),
            "--base-url",
            endpoint.url,
            text="piped\n",
        )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert f"with a.py (10 characters) from {tmp_path}" in done.stderr
    assert f"with b c.txt (11 characters) from {tmp_path}" in done.stderr
    (message,) = endpoint.asked[0]["messages"]
    code = "a.py:\n````\nx = 1\n```\n````"
    assert message["content"] == (
        "What is a.py, and b c.txt? Ask @me or @nobody.\n\n"
        f"{code}\n\n{code}\n\nb c.txt:\n```\nhello\nthere\n```\n\npiped"
    )


def test_a_path_that_is_not_meant_is_text(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    text = f"@{tmp_path}/secret"
    with Script(said("ok")) as endpoint:
        for args, piped in ((("--no-paths", text), None), ((), text)):
            done = chat(*args, "--base-url", endpoint.url, text=piped)
            assert (done.stdout, done.stderr) == ("ok\n", "")
            assert endpoint.asked[-1]["messages"][0]["content"] == text


def test_a_pipe_alone_is_the_question() -> None:
    with Script(said("ok")) as endpoint:
        done = chat("--base-url", endpoint.url, text="What?\n")
        assert done.stdout == "ok\n" and endpoint.asked[0]["messages"][0]["content"] == "What?"
        # A process may also be given as a file.
        command = f"{' '.join(LLMKIT)} chat --base-url {endpoint.url} -f <(echo within) hi"
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    assert done.returncode == 0 and "within" in endpoint.asked[-1]["messages"][0]["content"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a\0b", b"\x7fELF\x00"])
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    done = chat("hi", "--file", str(tmp_path / "x"), "--base-url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "is not UTF-8 text" in done.stderr
    done = subprocess.run([*LLMKIT, "chat", "hi"], input=data, capture_output=True)
    assert done.returncode == 1 and b"standard input is not UTF-8 text" in done.stderr


def test_endless_input_is_bounded() -> None:
    done = chat("hi", "--file", "/dev/zero", "--base-url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "longer than 16 MiB" in done.stderr


def test_words_that_only_look_like_paths_stay(tmp_path: Path) -> None:
    notes: list[str] = []
    text = "@app.route and me@here.org, @you, @~nobody/x, @" + "x" * 5000 + " \\@a"
    assert taken_apart(text, notes.append) == (text.replace("\\@a", "@a"), [])
    assert len(notes) == 2 and "no file app.route" in notes[0]
    assert question_of("", []) == "" and question_of(" ", [], "\n") == ""


# Any endpoint


def test_the_key_goes_to_the_endpoint_only(tmp_path: Path) -> None:
    with Script(said("x")) as proxy, Script(said("ok")) as endpoint:
        proxies = {name: proxy.url for name in ("http_proxy", "HTTP_PROXY", "all_proxy")}
        done = chat("hi", "--base-url", endpoint.url, OPENAI_API_KEY="sk-1", **proxies)
        assert done.stdout == "ok\n" and not proxy.heads
        assert endpoint.heads[-1][2]["authorization"] == "Bearer sk-1"
        chat("hi", "--base-url", endpoint.url, OPENAI_API_KEY="sk-1", LLMKIT_API_KEY="k2")
        assert endpoint.heads[-1][2]["authorization"] == "Bearer k2"
        chat("hi", "--base-url", endpoint.url, "--api-key", "k3", LLMKIT_API_KEY="k2")
        assert endpoint.heads[-1][2]["authorization"] == "Bearer k3"
        endpoint.answers[:] = [(302, {"Location": proxy.url}, b"")]
        done = chat("hi", "--base-url", endpoint.url, "--api-key", "k3")
        assert done.returncode == 1 and "has moved to" in done.stderr and not proxy.heads


@pytest.mark.parametrize(
    "models, name",
    [
        ([{"id": "gpt", "owned_by": "them"}], "gpt"),
        ([{"id": "a", "owned_by": "llmkit"}, {"id": "b", "owned_by": "llmkit"}], "default"),
        ([{"nonsense": 1}, {"id": "b"}], "b"),
    ],
)
def test_the_model_of_an_endpoint(models: list[dict[str, Any]], name: str) -> None:
    with Script(said("ok"), models=models) as endpoint:
        assert chat("hi", "--base-url", endpoint.url).stdout == "ok\n"
        assert endpoint.asked[-1]["model"] == name
        assert chat("hi", "-m", "other", "--base-url", endpoint.url).stdout == "ok\n"
        assert endpoint.asked[-1]["model"] == "other"


@pytest.mark.parametrize(
    "answer, words",
    [
        ((401, {}, b'{"error": {"message": "Wrong key."}}'), r"Wrong key\. \(.*--api-key"),
        ((500, {}, b"<html>"), r"status 500"),
        ((429, {}, b'{"error": "slow down"}'), r"slow down"),
        ((400, {}, b'{"detail": "no"}'), r"status 400|no"),
        ((200, {}, b"not json"), r"is not JSON: 'not json'"),
        ([chunk("a"), 'data: {"error": {"message": "it broke"}}\n\n'], r"it broke"),
        ([chunk("a"), "data: {nonsense\n\n"], r"not JSON"),
        ([chunk("a")], r"ended before the answer"),
        ([], r"ended before the answer"),
    ],
)
def test_failures_are_one_clear_line(answer: Any, words: str) -> None:
    with Script(answer) as endpoint:
        done = chat("hi", "-m", "m", "--base-url", endpoint.url)
    assert done.returncode == 1, done
    assert re.fullmatch(rf"llmkit: [^\n]*({words})[^\n]*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b'{"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]}'),
        ["data:" + chunk("ok")[6:], ": ping\n\n", "event: x\n", *said()],
        ['data: {"choices": []}\n\n', "data: {}\n\n", "data: 3\n\n", *said("ok")],
        ['data: {"choices": [{"delta": null, "message": 5}]}\n\n', *said("o", "k")],
        [chunk("ok", finish="stop", usage={"completion_tokens": "many", "prompt_tokens": -1})],
    ],
)
def test_what_other_servers_send(answer: Any) -> None:
    with Script(answer) as endpoint:
        done = chat("hi", "-m", "m", "--base-url", endpoint.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_nobody_answers() -> None:
    began = time.monotonic()
    done = chat("hi", "-m", "m", "--base-url", "http://127.0.0.1:9/v1")
    assert done.returncode == 1 and "nothing answers at http://127.0.0.1:9/v1" in done.stderr
    assert time.monotonic() - began < 40


async def test_a_gateway_of_ours(api: Api) -> None:
    import asyncio

    done = await asyncio.to_thread(chat, "hi", "--base-url", api.url, "--max-tokens", "5", "--json")
    answer = json.loads(done.stdout)
    assert answer["usage"]["completion_tokens"] == 5 and answer["model"] == "default"


@pytest.mark.parametrize(
    "url, base, root",
    [
        ("http://h:1", "http://h:1/v1", "http://h:1"),
        ("http://h:1/", "http://h:1/v1", "http://h:1"),
        ("https://h/llmkit/v1/", "https://h/llmkit/v1", "https://h/llmkit"),
        ("https://h/api/v3", "https://h/api/v3", "https://h/api/v3"),
        ("http://user:secret@h/v1", "http://h/v1", "http://h"),
        ("http://[::1]:8/v1", "http://[::1]:8/v1", "http://[::1]:8"),
    ],
)
def test_addresses(url: str, base: str, root: str) -> None:
    endpoint = Endpoint(url)
    assert (endpoint.base, endpoint.root) == (base, root)


@pytest.mark.parametrize(
    "url", ["", "h", "ftp://h", "http://", "http://h:99999", "http://h v", "http://h/v1?x=1", "//h"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="looks like"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["http://b\u00fccher.invalid/\u00fc", f"http://{'a' * 70}.invalid"])
def test_addresses_of_other_alphabets(url: str) -> None:
    done = chat("hi", "-m", "m", "--base-url", url)
    assert done.returncode == 1 and done.stderr.startswith("llmkit: nothing answers"), done.stderr


def test_arguments_that_are_no_utf8() -> None:
    with Script(said("ok")) as endpoint:
        args = [
            *LLMKIT,
            "chat",
            b"a\xffb",
            "-m",
            "m",
            "--system",
            b"\xfe",
            "--base-url",
            endpoint.url,
        ]
        done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"ok\n", b"")
        assert [m["content"] for m in endpoint.asked[-1]["messages"]] == ["?", "a?b"]


def test_closed_streams() -> None:
    with Script(said("ok")) as endpoint:
        command = f"{' '.join(LLMKIT)} chat hi -m m --base-url {endpoint.url} <&- >&- 2>&-"
        assert subprocess.run(["bash", "-c", command], timeout=60).returncode == 0
        assert len(endpoint.asked) == 1


# Stopping, and readers that leave


def test_ctrl_c_ends_one_question_with_130() -> None:
    stop = threading.Event()
    with Script(forever(stop)) as endpoint:
        process = subprocess.Popen(
            [*LLMKIT, "chat", "hi", "-m", "m", "--base-url", endpoint.url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.read(5) == "word0"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err and out.endswith("\n")
        assert stop.wait(30)  # the endpoint computes no more


def test_a_reader_that_leaves() -> None:
    stop = threading.Event()
    with Script(forever(stop)) as endpoint:
        command = f"{' '.join(LLMKIT)} chat hi -m m --base-url {endpoint.url} | head -c 5"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert stop.wait(30)
    assert (done.returncode, done.stdout, done.stderr) == (1, "word0", "")
