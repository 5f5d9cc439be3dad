"""Limits of models that draw, without the library: memory, turns, and an end in the middle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from drawing import FakePainter
from fakes import wait_for
from toy_models import write_checkpoint

from llmkit.drawing import TextToImage
from llmkit.errors import InvalidRequestError, ModelLoadError, ModelUnloadedError
from llmkit.models import image_files
from llmkit.models.registry import ModelSpec
from llmkit.protocol import FinishReason, GenerationRequest
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
    wait_for(lambda: engine.stats().num_running == 0, 10)
    streams = [ask("first", "bob")]
    wait_for(lambda: engine.stats().num_running == 1, 10)
    streams += [ask("again", "ann"), ask("second", "eve")]
    for _ in range(4 * 3):
        painter.gate.release()
    for stream in streams:
        stream.result(10)
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
    wait_for(lambda: len(painter.asked) == 4, 10)
    assert one.result(10).finish_reason is FinishReason.STOP
    first = [prompt for prompt, _ in painter.asked]
    assert first[:3] == ["many", "one", "left"]
    left.close()
    for _ in range(4 * 3):
        painter.gate.release()
    lines = ImageLines()
    events = [event for text in texts for event in lines.read(text)]
    assert [(e.index, e.seed) for e in events if isinstance(e, Picture)] == [(0, 5), (1, 6), (2, 7)]
    assert many.result(10).usage.completion_tokens == 3 * 4 * 128 * 64 // 256
    wait_for(lambda: engine.stats().num_running + engine.stats().num_waiting == 0, 10)
    engine.close()


def test_a_size_without_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "sd.safetensors")
    model = image_files.image_model(tmp_path / "sd.safetensors")
    room = model.weights_bytes + image_process.PROCESS_BYTES + model.buffer_of(1024, 1024)
    monkeypatch.setattr(image_process.ImageProcess, "_start", lambda *_: None)
    monkeypatch.setattr(image_process, "free_ram", lambda: room)
    process = image_process.ImageProcess(model)
    process.check_room(1024, 1024)
    with pytest.raises(InvalidRequestError, match=r"2048x2048 needs 9\.2 GB.*1024x1024 fits"):
        process.check_room(2048, 2048)
    with pytest.raises(InvalidRequestError, match="2048x2048"):
        list(process.images("a cat", Drawing(width=2048, height=2048), {}))
    image_process.ImageProcess(model, force=True).check_room(2048, 2048)


def test_a_model_that_reads_no_pictures_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose small decoder came without its other half."""
    write_checkpoint(tmp_path / "sd.safetensors")
    started = []

    def start(self: image_process.ImageProcess, *_: Any) -> None:
        started.append(self._reads)
        if self._reads:
            raise ModelLoadError("sd.safetensors cannot be loaded: tensor 'encoder' is missing.")

    monkeypatch.setattr(image_process.ImageProcess, "_start", start)
    process = image_process.ImageProcess(image_files.image_model(tmp_path / "sd.safetensors"))
    sides = {"width": 64, "height": 64}
    with pytest.raises(InvalidRequestError, match=r"^image: 'sd' cannot start .* is missing\."):
        list(process.images("a cat", Drawing(image="i", **sides), {"i": b""}))
    assert list(process.images("a cat", Drawing(**sides), {})) == []
    assert started == [False, True, False]


def test_unloading_during_an_image_says_so(tmp_path: Path) -> None:
    painter = FakePainter()
    painter.gate = threading.Semaphore(0)
    spec = ModelSpec("fake", tmp_path / "fake.safetensors")
    handle = TextToImage(LocalImages(spec, painter, EngineOptions()))

    def unload() -> None:
        wait_for(lambda: handle.stats.num_running == 1, 10)
        handle.unload()

    thread = threading.Thread(target=unload)
    thread.start()
    with pytest.raises(ModelUnloadedError):
        handle.generate("a cat")
    thread.join()
