"""Unloading a model of a kernel from outside: the memory comes back, its handle says so and loads
anew, and nobody loses what he had unless it was meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import tiny_models
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for
from gateway_client import serve
from jupyter_client_http import JupyterServer, Kernel

import llmkit
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import find_connections
from llmkit.bridge.server import BridgeServer
from llmkit.errors import (
    EngineGoneError,
    InvalidRequestError,
    ModelUnloadedError,
)
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.unloading import UnloadRoutes
from llmkit.protocol import Inquiry, Unload
from llmkit.system.process import process_start_time

LARGE = "llmkit.load('smollm2', n_ctx=2048, n_slots=4)"


@pytest.fixture
def model() -> Iterator[FakeClient]:
    """A fake model behind a bridge, which takes its time."""
    client = FakeClient(runner=FakeRunner(n_ctx=5000, step_s=0.005))
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


def unload(server: JupyterServer, model: str, **options: Any) -> Any:
    return server.request("POST", "/llmkit/admin/models/unload", {"model": model, **options})


def refused(server: JupyterServer, model: str, **options: Any) -> int:
    with pytest.raises(HTTPError) as told:
        unload(server, model, **options)
    told.value.close()
    return told.value.code


def models(server: JupyterServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.request("GET", "/llmkit/status")["models"]
    return found


def test_a_client_has_it_unloaded_and_everybody_is_told(model: FakeClient) -> None:
    client, bystander = (BridgeClient(find_connections()[0]) for _ in range(2))
    stream = bystander.submit(ask("hello", max_tokens=4000))
    wait_for(lambda: model.engine.stats.num_running)
    assert client.inquire(Inquiry("u", Unload())).result(30) is True
    with pytest.raises(ModelUnloadedError):
        stream.result()
    wait_for(lambda: client.state.is_gone and bystander.state.is_gone and not find_connections())
    assert "another program of yours unloaded it" in str(bystander.state.reason)
    with pytest.raises(EngineGoneError, match="Load it again"):
        client.inquire(Inquiry("u", Unload()))
    for each in (client, bystander):
        each.close()


def test_the_handle_says_so_and_loads_anew(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    llm = llmkit.load(path, n_ctx=256, n_slots=2)
    client = BridgeClient(find_connections()[0])
    assert client.inquire(Inquiry("u", Unload())).result(30) is True
    assert llm.closed and "the model 'tiny' was unloaded" in repr(llm)
    with pytest.raises(ModelUnloadedError, match=r"load it again with llmkit.load\(\)"):
        llm.generate("a")
    client.close()
    again = llmkit.load(path, n_ctx=256, n_slots=2)
    assert again is not llm and again.name == "tiny"
    assert again.generate("a", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    again.unload()
    llm.unload()


def test_one_that_is_isolated_ends_its_process(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    llm = llmkit.load(path, n_ctx=256, n_slots=2, isolated=True)
    pid = llm.engine.origin.pid
    client = BridgeClient(find_connections()[0])
    client.inquire(Inquiry("u", Unload())).result(30)
    client.close()
    wait_for(lambda: llm.closed and process_start_time(pid or 0) is None)
    assert "unloaded it" in repr(llm)
    llm.unload()


def test_an_engine_in_this_process_is_closed_not_asked(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    with (
        llmkit.load(path, n_ctx=256, n_slots=2) as llm,
        pytest.raises(InvalidRequestError, match="from another process"),
    ):
        llm.engine.inquire(Inquiry("u", Unload())).result()


async def test_the_route_waits_refuses_or_ends(model: FakeClient) -> None:
    directory = EngineDirectory()
    routes = UnloadRoutes(directory).routes()
    path = "/admin/models/unload"
    async for api in serve(None, directory=directory, admin=True, routes=routes):
        code, answer = await api.post(path, {"model": "x"})
        assert code == 404 and answer["error"]["code"] == "model_not_found"
        stream = model.submit(ask("hello", max_tokens=4000))
        wait_for(lambda: directory.lookup("fake").stats().num_running)
        code, answer = await api.post(path, {"model": "fake", "drain": False})
        assert code == 409 and answer["error"]["code"] == "model_busy"
        code, answer = await api.post(path, {"model": "fake", "wait": False})
        assert code == 202 and answer["phase"] == "draining"
        assert not directory.lookup("fake").state.is_gone
        code, answer = await api.post(path, {"model": "fake", "force": True})
        assert code == 200 and answer == {"id": "fake", "name": "fake", "phase": "unloaded"}
        with pytest.raises(ModelUnloadedError):
            stream.result()
        assert json.loads((await api.fetch("GET", "/status")).body)["models"] == []
        code, answer = await api.post("/v1/completions", {"model": "fake", "prompt": "a"})
        assert code == 503 and "unloaded" in answer["error"]["message"]


@pytest.mark.model
def test_the_memory_of_a_kernel_comes_back(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run("import llmkit, psutil\nrss = lambda: psutil.Process().memory_info().rss / 1e6")
    kernel.run(f"llm = {LARGE}; llm.generate('Once', max_tokens=3); llm.unload(); before = rss()")
    kernel.run(f"llm = {LARGE}; monitor = llm.monitor(); llm.generate('Once', max_tokens=3)")
    kernel.run("loaded = rss()")
    answer = unload(server, f"smollm2@{kernel.id}")
    assert answer["phase"] == "unloaded" and models(server) == []
    assert kernel.run("print(loaded - rss() > 60, rss() - before < 40, llm.closed)") == (
        "True True True\n"
    ), kernel.run("print(before, loaded, rss())")
    assert "the model 'smollm2' was unloaded" in kernel.run("print(repr(llm))")
    again = kernel.run(f"llm = {LARGE}; print(llm.generate('Once', max_tokens=3).tokens != ())")
    assert again == "True\n" and [m["kernel"] for m in models(server)] == [kernel.id]


@pytest.mark.model
def test_a_cell_that_generates_ends_with_an_error(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(f"import llmkit; llm = {LARGE}")
    cell = kernel.start("llm.generate('Once', max_tokens=2000, ignore_eos=True)")
    wait_for(lambda: any(m["num_running"] for m in models(server)), 30)
    assert refused(server, "smollm2", drain=False) == 409
    assert unload(server, "smollm2", force=True)["phase"] == "unloaded"
    _, error = kernel.wait(cell)
    assert error is not None and error.startswith("ModelUnloadedError")


@pytest.mark.model
def test_a_model_that_unloaded_itself_meanwhile(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(f"import llmkit; llm = {LARGE}")
    assert [m["id"] for m in models(server)] == ["smollm2"]
    kernel.run("llm.unload()")
    assert refused(server, "smollm2") == 503


def test_others_in_a_bridge_hear_the_bridge(model: FakeClient) -> None:
    """Twice at once: the second one's answer is the goodbye."""
    client = BridgeClient(find_connections()[0])
    first, second = (client.inquire(Inquiry(f"u{i}", Unload())) for i in range(2))
    assert first.result(30) is True
    with pytest.raises(EngineGoneError, match="another program of yours unloaded it"):
        second.result(30)
    client.close()


def test_a_bridge_outlives_no_client(model: FakeClient) -> None:
    bridge = BridgeServer(FakeClient("other", FakeRunner()))
    client = BridgeClient(next(c for c in find_connections() if c.model.name == "other"))
    client.inquire(Inquiry("u", Unload())).result(30)
    wait_for(lambda: not bridge.alive)
    assert [c.model.name for c in find_connections()] == ["fake"] and not bridge.is_unloading
    client.close()
