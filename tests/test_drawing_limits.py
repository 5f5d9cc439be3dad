"""Limits of models that draw, without the library: memory, turns, and an end in the middle."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from drawing import FakePainter
from fakes import wait_for
from pictures import picture
from toy_models import write_checkpoint

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.drawing import TextToImage
from llmkit.errors import InvalidRequestError, ModelLoadError, ModelUnloadedError
from llmkit.models import image_files
from llmkit.models.registry import ModelSpec
from llmkit.protocol import FinishReason, GenerationRequest
from llmkit.protocol.client import EngineClient
from llmkit.protocol.images import Drawing, ImageLines, Picture
from llmkit.runtime import image_process
from llmkit.runtime.images import LocalImages
from llmkit.settings.options import EngineOptions


def test_who_leaves_pays_for_the_reload(tmp_path: Path) -> None:
    painter = FakePainter()
    painter.gate, painter.load_s = threading.Semaphore(0), 1000.0
    engine = LocalImages(ModelSpec("fake", tmp_path / "fake.safetensors"), painter, EngineOptions())

    def ask(name: str, caller: str) -> Any:
        return engine.submit(
            GenerationRequest(name, prompt=name, caller=caller, drawing=Drawing(seed=1))
        )

    left = ask("left", "ann")
    assert next(iter(left))  # it has begun
    left.close()
    wait_for(lambda: engine.stats().num_running == 0)
    streams = [ask("first", "bob")]
    wait_for(lambda: engine.stats().num_running == 1)
    streams += [ask("again", "ann"), ask("second", "eve")]
    for _ in range(4 * 3):
        painter.gate.release()
    for stream in streams:
        stream.result(30)
    assert [prompt for prompt, _ in painter.asked] == ["left", "first", "second", "again"]
    engine.close()


def test_callers_take_turns_after_each_image(tmp_path: Path) -> None:
    painter = FakePainter()
    painter.gate = threading.Semaphore(0)
    engine = LocalImages(ModelSpec("fake", tmp_path / "fake.safetensors"), painter, EngineOptions())

    def ask(name: str, n: int) -> Any:
        return engine.submit(
            GenerationRequest(name, prompt=name, caller=name, drawing=Drawing(n=n, seed=5))
        )

    many = ask("many", 3)
    texts = iter(many)
    next(texts)  # it has begun
    one, left = ask("one", 1), ask("left", 2)
    for _ in range(4 * 3):
        painter.gate.release()
    wait_for(lambda: len(painter.asked) == 4)
    assert one.result(30).finish_reason is FinishReason.STOP
    first = [prompt for prompt, _ in painter.asked]
    assert first[:3] == ["many", "one", "left"]
    left.close()
    for _ in range(4 * 3):
        painter.gate.release()
    lines = ImageLines()
    events = [event for text in texts for event in lines.read(text)]
    assert [(e.index, e.seed) for e in events if isinstance(e, Picture)] == [(0, 5), (1, 6), (2, 7)]
    assert many.result(30).usage.completion_tokens == 3 * 4 * 128 * 64 // 256
    wait_for(lambda: engine.stats().num_running + engine.stats().num_waiting == 0)
    engine.close()


def test_a_size_without_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "sd.safetensors")
    model = image_files.image_model(tmp_path / "sd.safetensors")
    room = model.weights_bytes + image_process.PROCESS_BYTES + model.buffer_of(1024, 1024)
    monkeypatch.setattr(image_process.ImageProcess, "_start", lambda *_, reads: None)
    monkeypatch.setattr(image_process, "free_ram", lambda: room)
    process = image_process.ImageProcess(model)
    process.check_room(1024, 1024)
    with pytest.raises(InvalidRequestError, match=r"2048x2048 needs 9\.2 GB.*1024x1024 fits"):
        process.check_room(2048, 2048)
    with pytest.raises(InvalidRequestError, match="2048x2048"):
        list(process.images("a cat", Drawing(width=2048, height=2048), {}))
    image_process.ImageProcess(model, force=True).check_room(2048, 2048)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each process that was started, whether it was to read pictures: those of `loading`."""
    monkeypatch.setattr(image_process.image_child, "TARGET", "drawing:loading")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    started, start = [], image_process.ImageProcess._start

    def counted(*args: Any, reads: bool) -> None:
        started.append(reads)
        start(*args, reads=reads)

    monkeypatch.setattr(image_process.ImageProcess, "_start", counted)
    return started


def painter(folder: Path, name: str) -> image_process.ImageProcess:
    write_checkpoint(folder / f"{name}.safetensors")
    return image_process.ImageProcess(image_files.image_model(folder / f"{name}.safetensors"))


SIDES: dict[str, Any] = {"width": 64, "height": 64}
PNG = picture()


def test_a_model_that_reads_no_pictures_goes_on_without(tmp_path: Path, starts: list[bool]) -> None:
    """As one whose small decoder came without its other half. It is tried once."""
    process = painter(tmp_path, "sd")
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"^image: 'sd' cannot start .* is missing\."):
            list(process.images("a cat", Drawing(image="i", **SIDES), {"i": PNG}))
        assert len(list(process.images("a cat", Drawing(**SIDES), {}))) == 1
        pid = process.pid
    assert starts == [False, True, False] and pid == process.pid
    process.close()


def test_a_model_that_reads_no_pictures_says_so(tmp_path: Path, starts: list[bool]) -> None:
    """Also to those who reach it from other processes."""
    spec = ModelSpec("sd", tmp_path / "sd.safetensors")
    engine = LocalImages(spec, painter(tmp_path, "sd"), EngineOptions())
    bridge = BridgeServer(engine)
    clients: list[EngineClient] = [engine, BridgeClient(bridge.connection)]
    edit = GenerationRequest(
        "r", prompt="a cat", drawing=Drawing(image="i", **SIDES), media={"i": PNG}
    )
    assert all(client.description.inputs == ("image",) for client in clients)
    with pytest.raises(InvalidRequestError, match="is missing"):
        engine.submit(edit).result(30)
    for client in clients:
        wait_for(lambda client=client: client.description.inputs == ())  # type: ignore[misc]
        with pytest.raises(InvalidRequestError, match="It can draw without one"):
            client.submit(edit)
    assert starts == [False, True]
    clients[1].close()
    bridge.close()
    engine.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_a_process_that_was_killed_is_no_refusal(tmp_path: Path, starts: list[bool]) -> None:
    process = painter(tmp_path, "killed")
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="SIGKILL, perhaps because memory ran out"):
            list(process.images("a cat", Drawing(image="i", **SIDES), {"i": PNG}))
        assert process.refusal is None
    assert len(list(process.images("a cat", Drawing(**SIDES), {}))) == 1
    assert starts == [False, True, True, False]
    process.close()


def test_who_leaves_while_it_is_tried_costs_others_nothing(
    tmp_path: Path, starts: list[bool]
) -> None:
    process = painter(tmp_path, "sd")
    assert not list(process.images("a cat", Drawing(image="i", **SIDES), {"i": PNG}, lambda: True))
    assert len(list(process.images("a cat", Drawing(**SIDES), {}))) == 1
    assert starts == [False, True, False]
    process.close()


def test_unloading_during_an_image_says_so(tmp_path: Path) -> None:
    painter = FakePainter()
    painter.gate = threading.Semaphore(0)
    spec = ModelSpec("fake", tmp_path / "fake.safetensors")
    handle = TextToImage(LocalImages(spec, painter, EngineOptions()))

    def unload() -> None:
        wait_for(lambda: handle.stats.num_running == 1)
        handle.unload()

    thread = threading.Thread(target=unload)
    thread.start()
    with pytest.raises(ModelUnloadedError):
        handle.generate("a cat")
    thread.join()
