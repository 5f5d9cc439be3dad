"""Drawing with stable-diffusion.cpp and a model of the right shapes: seeds, steps, cancelling,
crashes, in a notebook's process and behind `llmkit serve`."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from drawing import image
from fakes import wait_for
from test_cli import Served
from toy_models import write_checkpoint, write_decoder

import llmkit
from llmkit import TextToImage
from llmkit.diffusion.extra import INSTALL, is_installed
from llmkit.errors import EngineError, InvalidModelFileError, InvalidRequestError, ModelLoadError
from llmkit.media.addresses import digest_of
from llmkit.media.pictures import png
from llmkit.notebook.drawing import LiveImages
from llmkit.protocol import GenerationRequest
from llmkit.protocol.images import Drawing, ImageLines, Picture, Step
from llmkit.sessions.running import Interrupted

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not is_installed(), reason=f"STABLE-DIFFUSION.CPP IS NOT TESTED: {INSTALL} is missing"
    ),
]
SMALL = {"size": "64x64", "steps": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    write_checkpoint(folder / "small.safetensors")
    write_decoder(folder / "taesd.safetensors")
    return folder / "small.safetensors"


@pytest.fixture(scope="module")
def small(file: Path) -> Iterator[TextToImage]:
    # One thread: several would wait for each other where other processes compute.
    with llmkit.load(file, share=False, threads=2) as handle:
        yield handle  # type: ignore[misc]


def pid_of(handle: TextToImage) -> int | None:
    return handle.engine._model.pid  # type: ignore[attr-defined, no-any-return]


def events(
    handle: TextToImage, files: dict[str, bytes] | None = None, **options: Any
) -> Iterator[Step | Picture]:
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, **options}
    drawing = Drawing(**fields)
    stream = handle.engine.submit(
        GenerationRequest(f"r{id(fields)}", prompt="a cat", drawing=drawing, media=files or {})
    )
    lines = ImageLines()
    with stream:
        for text in stream:
            yield from lines.read(text)


def test_a_seed_gives_the_same_image_again(small: TextToImage) -> None:
    assert isinstance(small, TextToImage) and llmkit.load(small.model.path) is small
    assert repr(small) == "TextToImage('small', 512x512)"
    first = small.generate("a cat", seed=1, **SMALL)  # type: ignore[arg-type]
    again, other = small.generate("a cat", seed=1, n=2, **SMALL)  # type: ignore[arg-type, misc]
    assert first.size == (64, 64) and first.tobytes() == again.tobytes()  # type: ignore[union-attr]
    assert other.tobytes() != again.tobytes()
    assert [i.info["seed"] for i in (first, again, other)] == [1, 1, 2]  # type: ignore[union-attr]
    assert again.info["prompt"] == "a cat" and again.info["steps"] == "2"
    assert small.last is not None and "seed 2" in small.last._repr_html_()
    unlike = small.generate("a cat", seed=1, negative_prompt="a dog", cfg_scale=1, **SMALL)  # type: ignore[arg-type]
    assert unlike.info["cfg_scale"] == "1"  # type: ignore[union-attr]


def test_steps_grow_from_none_to_all(small: TextToImage) -> None:
    found = list(events(small, n=2, steps=5, previews=2))
    steps = [(e.index, e.step, e.steps) for e in found if isinstance(e, Step)]
    assert steps == [(index, step, 5) for index in (0, 1) for step in range(6)]
    shown = [e for e in found if isinstance(e, Step) and e.preview]
    assert [(e.index, e.step) for e in shown] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert all(image(e.preview).size == (64, 64) for e in shown)
    assert [e.index for e in found if isinstance(e, Picture)] == [0, 1]


def test_a_cancelled_image_gives_its_memory_back(small: TextToImage) -> None:
    list(events(small))
    pid = pid_of(small)
    assert pid is not None and psutil.Process(pid).memory_info().rss > 800e6
    for event in events(small, steps=50):
        if isinstance(event, Step) and event.step == 2:
            break
    wait_for(lambda: not psutil.pid_exists(pid))
    assert pid_of(small) is None
    wait_for(lambda: small.stats.num_running == 0)
    assert isinstance(list(events(small))[-1], Picture)
    assert pid_of(small) not in (None, pid)


def test_a_process_that_is_killed_is_started_again(small: TextToImage) -> None:
    with pytest.raises(EngineError, match=r"'small' was ended by SIGKILL.*starts it again"):
        for event in events(small, steps=50):
            if isinstance(event, Step) and event.step == 1:
                os.kill(pid_of(small) or 0, signal.SIGKILL)
    assert not small.closed
    assert isinstance(list(events(small))[-1], Picture)
    os.kill(pid_of(small) or 0, signal.SIGKILL)  # while it has nothing to do
    wait_for(lambda: pid_of(small) is None)
    assert isinstance(list(events(small))[-1], Picture)


def test_the_stop_button_ends_the_process(
    small: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: LiveImages, event: Step | Picture) -> None:
        if event.index == 1:
            raise KeyboardInterrupt

    list(events(small))
    pid = pid_of(small)
    with monkeypatch.context() as only:
        only.setattr(LiveImages, "add", stop)
        with pytest.raises(Interrupted, match=r"\.last"):
            small.generate("a cat", n=3, seed=4, **SMALL)  # type: ignore[arg-type]
    assert small.last is not None and [i.info["seed"] for i in small.last] == [4]
    wait_for(lambda: not psutil.pid_exists(pid or 0))
    assert small.generate("a cat", **SMALL).size == (64, 64)  # type: ignore[arg-type, union-attr]


def test_an_image_starts_from_a_picture(small: TextToImage) -> None:
    """What the mask keeps stays whatever the seed; the model is loaded again for the first one."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    photo = np.stack([4 * x, 4 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[:, :32, 3] = 0  # its left half

    def drawn(picture: np.ndarray, seed: int, mask: np.ndarray | None = None) -> np.ndarray:
        made = small.generate("a cat", image=picture, mask=mask, seed=seed, **SMALL)  # type: ignore[arg-type]
        return np.asarray(made).astype(int)

    list(events(small))
    pid = pid_of(small)
    first, again = drawn(photo, 1), drawn(photo, 1)
    assert pid_of(small) not in (None, pid) and (first == again).all()
    pid = pid_of(small)
    assert (drawn(np.full((64, 64, 3), 90, np.uint8), 1) != first).any()
    changed = np.abs(drawn(photo, 1, mask) - drawn(photo, 2, mask))
    assert changed[:, 56:].mean() < 0.1 * changed[:, :32].mean()
    with pytest.raises(InvalidRequestError, match=r"image: .*cut off or broken"):
        small.generate("a cat", image=png(photo)[:-60], **SMALL)  # type: ignore[arg-type]
    given = {"image": digest_of(png(photo)), "strength": 0.5, "steps": 3}
    told = list(events(small, {given["image"]: png(photo)}, **given))
    assert [e.step for e in told if isinstance(e, Step)] == [0, 1, 2]  # as many as there are
    assert isinstance(told[-1], Picture) and image(told[-1].data).info["strength"] == "0.5"
    assert isinstance(list(events(small))[-1], Picture) and pid_of(small) == pid


def test_wrong_requests_and_files_are_refused(small: TextToImage, tmp_path: Path) -> None:
    for options in ({"size": "64"}, {"size": (64, 65)}, {"steps": 0}, {"n": 11}, {"seed": -1}):
        with pytest.raises(InvalidRequestError):
            small.generate("a cat", **options)  # type: ignore[arg-type]
    whole = Path(small.model.path)
    cut = tmp_path / "cut.safetensors"
    with whole.open("rb") as source:
        cut.write_bytes(source.read(200_000))
    with pytest.raises((InvalidModelFileError, ModelLoadError)):
        llmkit.load(cut)


def test_unloading_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    copy = tmp_path / "copy.safetensors"
    write_checkpoint(copy)
    write_decoder(tmp_path / "taesd.safetensors")
    handle: Any = llmkit.load(copy, share=False)
    pid = pid_of(handle)
    assert pid is not None and psutil.pid_exists(pid)
    child = psutil.Process(pid)
    assert child.nice() > psutil.Process().nice() or child.nice() == 19
    assert "PATH" in child.environ() and "HF_TOKEN" not in child.environ()
    handle.unload()
    wait_for(lambda: not psutil.pid_exists(pid))


@pytest.fixture(scope="module")
def server(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    server = Served(
        str(file), "--port", "0", "--threads", "2", "--log-level", "warning", "--no-access-log",
        JUPYTER_RUNTIME_DIR=str(folder), XDG_DATA_HOME=str(folder / "data"),
    )  # fmt: skip
    wait_for(lambda: server.health() == 200, 60)
    yield server
    code, errors = server.stop(signal.SIGINT)
    assert code == 0 and "Traceback" not in errors, errors


def of(server: Served) -> dict[str, Any]:
    state = httpx.get(server.url.removesuffix("/v1") + "/status", timeout=60).json()
    return next(m for m in state["models"] if m["id"] == "small")


def draws(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.memory_info().rss > 500e6:
                found.append(process)
    return found


def test_a_server_draws_and_outlives_its_painter(server: Served, small: TextToImage) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="k", max_retries=0)

    def draw(**options: Any) -> Any:
        more = {"seed": 1, "steps": 2, **options}
        return client.images.generate(
            model="small",
            prompt="a cat",
            size="64x64",
            extra_body=more,  # type: ignore[arg-type]
        )

    made = draw()
    data = image(base64.b64decode(made.data[0].b64_json))
    local = small.generate("a cat", seed=1, **SMALL)  # type: ignore[arg-type]
    assert data.tobytes() == local.tobytes()  # type: ignore[union-attr]
    worker = of(server)["pid"]
    (painter,) = draws(worker)

    def kill() -> None:
        wait_for(lambda: of(server)["num_running"] == 1)
        painter.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(openai.InternalServerError, match="was ended by SIGKILL"):
        draw(steps=150)
    killer.join()
    assert draw().data[0].b64_json == made.data[0].b64_json
    assert of(server)["pid"] == worker
    (painter,) = draws(worker)
    stream = client.images.generate(
        model="small", prompt="a cat", size="64x64", stream=True, partial_images=3,  # type: ignore[arg-type]
        extra_body={"steps": 8},
    )  # fmt: skip
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()
    wait_for(lambda: not painter.is_running())
    assert draw().data[0].b64_json == made.data[0].b64_json
