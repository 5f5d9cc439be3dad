"""`%llm` and `%%llm` on the fake model: what is replaced in a cell, which model answers, and what
the stop button shows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient, interrupt_after
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from llmkit.handle import Handle
from llmkit.llm import LLM
from llmkit.notebook.magics import LLMMagics
from llmkit.protocol import Embeddings, FinishReason, ModelDescription
from llmkit.runtime.loaded import loaded
from llmkit.sessions.running import Interrupted


class Other(FakeClient):
    """A model that writes nothing."""

    def __init__(self, name: str, **description: Any) -> None:
        super().__init__(name)
        self.description = ModelDescription(name, name, **description)


@pytest.fixture
def llm() -> Iterator[LLM]:
    handle = LLM(FakeClient("fake", FakeRunner(n_ctx=50_000, step_s=0.001)))
    loaded.add(None, handle)
    yield handle
    loaded.forget(handle)
    handle.unload()


@pytest.fixture
def magics(llm: LLM) -> LLMMagics:
    others = {
        "ears": {"hears": True},
        "voice": {"voices": ("a",)},
        "painter": {"image_size": "64x64"},
        "vectors": {"embedding_size": 2},
    }

    def load(name: str, **_: Any) -> Handle:
        handle = (LLM if name == "vectors" else Handle)(Other(name, **others[name]))
        loaded.add(None, handle)
        return handle

    return LLMMagics(InteractiveShell(), load, print)


def test_what_ipython_put_there_is_not_replaced(magics: LLMMagics) -> None:
    shell = magics.shell
    assert shell is not None
    code = (
        "with {open} as {In}: print({Out}, {_}, {__}, {exit}, {__name__}, {get_ipython}, {print})"
    )
    assert magics._expand(code) == code
    shell.run_cell("40 + 2", store_history=True)
    assert (
        magics._expand(f"{code} {{_1}} {{_i1}} {{Out[1]}}") == f"{code} {{_1}} {{_i1}} {{Out[1]}}"
    )
    shell.run_cell("open, names = 'mine', ['a', 'b']", store_history=True)
    shell.run_cell("print = str.upper", store_history=True)
    assert magics._expand("{open} {names[1]} {exit}") == "mine b {exit}"
    assert magics._expand("{print}").startswith("<method")
    # What a startup file of the user's says is hidden too.
    shell.user_ns["PROJECT"] = shell.user_ns_hidden["PROJECT"] = "llm"
    assert magics._expand("{PROJECT}") == "llm"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("ears", r"hears and does not write; use \.transcribe"),
        ("voice", r"speaks and does not write; use \.say"),
        ("painter", r"draws and does not write; use \.generate"),
        ("vectors", r"makes vectors and does not write; use \.embed"),
    ],
)
def test_models_that_do_not_write(magics: LLMMagics, name: str, use: str) -> None:
    magics.used = "fake"
    magics.llm(f"load {name} --as other")
    other = magics._variables["other"]
    try:
        assert magics.used == "fake", "cells go on with it"
        for line, cell in ((f"-m {name}", "Hello"), (f"profile {name}", None)):
            with pytest.raises(UsageError, match=f"'{name}' {use}"):
                magics.llm(line, cell)
        magics.llm(f"status {name}")
        magics.used = None
        assert magics._used() == "fake"
    finally:
        loaded.forget(other)
        other.unload()


@pytest.mark.parametrize("options", ["", "--raw", "-o answer"])
def test_stop_is_one_line(
    magics: LLMMagics, llm: LLM, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    interrupt_after(llm, 20)
    where = "answer" if "-o" in options else "llm.last"
    with pytest.raises(Interrupted, match=f"so far is in {where}") as stopped:
        magics.llm(f"-n 40000 {options}", "Hello")
    assert stopped.value._render_traceback_() == [f"Interrupted: {stopped.value}"]
    kept = magics._variables["answer"] if "-o" in options else llm.last
    assert kept.finish_reason is FinishReason.ABORT and kept.text
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("call", ["embed", "rerank"])
def test_stop_ends_vectors_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Future[Embeddings]):
        def result(self, timeout: float | None = None) -> Embeddings:
            raise KeyboardInterrupt

    client = Other("vectors", embedding_size=2)
    ended: list[str] = []
    monkeypatch.setattr(client, "embed", lambda request: (asked.append(request), Stopped())[1])
    monkeypatch.setattr(client, "abort", ended.append)
    asked: list[Any] = []
    llm = LLM(client)
    with pytest.raises(Interrupted):
        llm.embed(["a", "b"]) if call == "embed" else llm.rerank("a", ["b"])
    assert ended == [asked[0].request_id]
    llm.unload()
