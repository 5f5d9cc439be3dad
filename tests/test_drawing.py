"""Drawing without the library: `/v1/images/generations` with the stock SDK, what is refused, and
which files are models that draw."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from drawing import FakePainter, image
from drawing_gateway import Drawn, drawn
from fakes import wait_for
from gateway_client import serve
from toy_models import write_checkpoint, write_decoder

from llmkit.diffusion import extra
from llmkit.diffusion.stable_diffusion import _Counter
from llmkit.errors import (
    EngineError,
    InsufficientMemoryError,
    InvalidModelFileError,
    InvalidRequestError,
    ModelLoadError,
)
from llmkit.gateway.directory import EngineDirectory
from llmkit.loading import estimate
from llmkit.models import image_files
from llmkit.models.registry import ModelSpec, resolve
from llmkit.protocol import FinishReason, GenerationRequest
from llmkit.protocol.images import Drawing, ImageLines, Picture, Step
from llmkit.runtime import images
from llmkit.runtime.images import LocalImages, open_images
from llmkit.settings.options import EngineOptions
from llmkit.workers.budget import need_of
from llmkit.workers.engine import task

__all__ = ["drawn"]  # a fixture


async def test_images_in_every_format_and_size(drawn: Drawn) -> None:
    for form, kind in (("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")):
        made = await drawn.draw(n=2, size="192x128", output_format=form, seed=5, steps=3)
        assert (made.output_format, made.size, made.background) == (form, "192x128", "opaque")
        assert [each.seed for each in made.data] == [5, 6] and made.seed == 5
        for seed, each in zip((5, 6), made.data, strict=True):
            found = image(base64.b64decode(each.b64_json))
            assert (found.format, found.size) == (kind, (192, 128))
            if form == "png":
                assert found.getpixel((9, 9)) == (seed, 7, 9)
                assert found.info["seed"] == str(seed)
        assert made.usage.output_tokens == 3 * 2 * 192 * 128 // 256
        assert made.usage.total_tokens == made.usage.output_tokens + made.usage.input_tokens
    made = await drawn.draw(model="default")
    assert made.size == "128x64" and made.data[0].seed == made.seed >= 0
    small, large = [
        len((await drawn.draw(output_format="jpeg", output_compression=q)).data[0].b64_json)
        for q in (5, 100)
    ]
    assert small <= large
    _, asked = drawn.painter.asked[-1]
    assert (asked.quality, asked.steps, asked.width) == (100, 4, 128)
    listed = [m for m in (await drawn.client.models.list()).data if m.id == "fake"]
    kinds = listed[0].architecture  # type: ignore[attr-defined]
    assert kinds == {"input_modalities": ["text", "image"], "output_modalities": ["image"]}


async def test_a_stream_shows_steps_in_order_and_then_the_image(drawn: Drawn) -> None:
    for previews in (0, 1, 3):
        stream = await drawn.draw(
            n=2, stream=True, partial_images=previews, seed=1, steps=8, output_format="webp"
        )
        events = [event async for event in stream]
        kinds = [(e.type.removeprefix("image_generation."), e.image_index) for e in events]
        partial = [("partial_image", i) for i in (0, 1) for _ in range(previews)]
        assert kinds == [
            *partial[:previews], ("completed", 0), *partial[previews:], ("completed", 1),
        ]  # fmt: skip
        for index in (0, 1):
            seen = [e for e in events if "partial" in e.type and e.image_index == index]
            assert [e.partial_image_index for e in seen] == list(range(previews))
            steps = [e.step for e in seen]
            assert steps == sorted(set(steps)) and all(0 < s < 8 for s in steps)
        for event in events:
            found = image(base64.b64decode(event.b64_json))
            assert (found.format, found.size) == ("WEBP", (128, 64))
        done = [e for e in events if e.type == "image_generation.completed"]
        assert [e.seed for e in done] == [1, 2]
        assert sum(e.usage.output_tokens for e in done) == 8 * 2 * 128 * 64 // 256
        assert done[0].usage.output_tokens == 8 * 128 * 64 // 256
        assert [e.usage.input_tokens > 0 for e in done] == [False, True]


async def test_events_have_their_names(drawn: Drawn) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 1}
    reply = await drawn.api.fetch("POST", "/v1/images/generations", body)
    blocks = reply.body.decode().strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert len(blocks) == 2


async def test_what_is_refused_is_named(drawn: Drawn) -> None:
    drawn.painter.max_pixels = 512 * 512
    for options, param in (
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"size": "large"}, "size"),
        ({"size": "500x512"}, "size"),
        ({"size": "4096x64"}, "size"),
        ({"seed": -1}, "seed"),
        ({"steps": 151}, "steps"),
        ({"steps": 0}, "steps"),
        ({"cfg_scale": 31}, "cfg_scale"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"extra_body": {}, "user": 7}, "user"),
        ({"n": 10, "size": "2048x2048", "steps": 100}, "n"),
        ({"size": "1024x1024"}, "size"),
        ({"prompt": "a \0 cat"}, "prompt"),
        ({"negative_prompt": "\ud800"}, "negative_prompt"),
    ):
        body = {"model": "fake", "prompt": "a cat", **options}
        body.pop("extra_body", None)
        code, answer = await drawn.api.post("/v1/images/generations", body)
        assert code == 400 and answer["error"]["param"] == param, (options, answer)
    code, answer = await drawn.api.post(
        "/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert code == 400 and "/v1/images/generations" in answer["error"]["message"]
    raw = await drawn.client.images.with_raw_response.generate(
        prompt="a cat", quality="high", output_compression=50
    )
    assert raw.headers["x-llmkit-ignored"] == "quality, output_compression"
    assert not drawn.painter.asked or all(p == "a cat" for p, _ in drawn.painter.asked)


async def test_a_failure_is_an_error_and_the_next_request_works(drawn: Drawn) -> None:
    with pytest.raises(openai.InternalServerError, match="SIGKILL"):
        await drawn.draw(prompt="crash")
    reply = await drawn.api.fetch(
        "POST", "/v1/images/generations", {"prompt": "crash", "stream": True}
    )
    assert b"SIGKILL" in reply.body and b"completed" not in reply.body
    assert (await drawn.draw(seed=3)).data[0].seed == 3


async def test_a_caller_who_leaves_ends_the_work(drawn: Drawn) -> None:
    drawn.painter.gate = threading.Semaphore(2)
    stream = await drawn.draw(stream=True, partial_images=3, steps=8)
    first = await anext(aiter(stream))
    assert first.partial_image_index == 0
    await stream.close()
    await asyncio.to_thread(drawn.painter.stopped.wait, 30)
    assert drawn.painter.stopped.is_set()
    drawn.painter.gate = None
    assert (await drawn.draw(seed=3)).data[0].seed == 3
    task = asyncio.ensure_future(drawn.draw(prompt="a dog"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_for(lambda: drawn.engine.stats().num_running == 0)


async def test_without_the_extra_the_route_says_what_to_install() -> None:
    async for api in serve(None, directory=EngineDirectory([])):
        code, answer = await api.post("/v1/images/generations", {"prompt": "a cat"})
        assert code == 404 and 'pip install "llmkit[images]"' in answer["error"]["message"]


def test_loading_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "sd.safetensors")
    spec = resolve(tmp_path / "sd.safetensors")
    assert spec.name == "sd"
    monkeypatch.setattr(extra, "PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadError, match=r'pip install "llmkit\[images\]"'):
        open_images(spec, EngineOptions())


def test_a_model_that_does_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "sd.safetensors")
    monkeypatch.setattr(images, "check_installed", lambda: None)
    monkeypatch.setattr(images, "free_ram", lambda: 1 << 30)
    with pytest.raises(InsufficientMemoryError, match=r"2\.8 GB of memory.*taesd"):
        open_images(resolve(tmp_path / "sd.safetensors"), EngineOptions())
    before = estimate(tmp_path / "sd.safetensors")
    write_decoder(tmp_path / "taesd.safetensors")
    after = estimate(tmp_path / "sd.safetensors")
    assert after.total_bytes < before.total_bytes - 500e6 and "KV" not in repr(after)
    spec = resolve(tmp_path / "sd.safetensors")
    need = need_of(task(spec, EngineOptions(), name=None))
    assert need.in_child and after.total_bytes < need.ram_bytes < after.total_bytes + 200e6


def safetensors(names: list[str]) -> bytes:
    header = {n: {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} for n in names}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0\0"


def test_families_are_told_by_their_tensors(tmp_path: Path) -> None:
    whole = "model.diffusion_model."
    for names, family, is_whole in (
        ([f"{whole}input_blocks.0", f"{whole}output_blocks.0"], "sd1", True),
        ([f"{whole}input_blocks.0", f"{whole}output_blocks.0", "cond_stage_model.model.x"],
         "sd2", True),
        ([f"{whole}input_blocks.0", f"{whole}output_blocks.0", f"{whole}label_emb.0"],
         "sdxl", True),
        ([f"{whole}joint_blocks.0.x"], "sd3", True),
        (["double_blocks.0.img_attn.qkv.weight"], "flux", False),
    ):  # fmt: skip
        file = tmp_path / f"{family}-turbo.safetensors"
        file.write_bytes(safetensors(names))
        found = image_files.image_model(file)
        assert (found.family, found.is_whole, found.steps) == (family, is_whole, 4)
        assert found.size == ((512, 512) if family in ("sd1", "sd2") else (1024, 1024))
    with pytest.raises(ModelLoadError, match=r"vae\.safetensors, clip_l\.safetensors, t5xxl"):
        found.check()
    for part in ("vae", "clip_l"):
        (tmp_path / f"{part}.safetensors").write_bytes(safetensors(["weight"]))
    (tmp_path / "flux-turbo.t5xxl.gguf").write_bytes(b"")
    found = image_files.image_model(file)
    assert set(found.parts) == {"vae", "clip_l", "t5xxl"}
    with pytest.raises(InvalidModelFileError, match="t5xxl"):
        found.check()
    (tmp_path / "flux-turbo.t5xxl.safetensors").write_bytes(safetensors(["weight"]))
    image_files.image_model(file).check()
    assert image_files.image_model(tmp_path / "sd1-turbo.safetensors").parts == {}


def test_what_is_no_model_that_draws(tmp_path: Path) -> None:
    for name, data in (
        ("adapter.safetensors", safetensors(["lora_unet_down_blocks.weight"])),
        ("text.safetensors", b"hello"),
        ("empty.safetensors", b""),
        ("long.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
        ("list.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("deep.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
        ("wide.safetensors", (300_000).to_bytes(8, "little") + b"[" + b"[]," * 99_999 + b"[]"),
        ("cut.safetensors", safetensors(["model.diffusion_model.input_blocks.0"])[:-1]),
        ("minus.safetensors", b'\x20\0\0\0\0\0\0\0{"a": {"data_offsets": [-1, 0]} }'),
        ("text.gguf", b"hello"),
        ("model.bin", b"hello"),
    ):
        (tmp_path / name).write_bytes(data)
        assert not image_files.is_image_model(tmp_path / name)
        with pytest.raises(InvalidModelFileError):
            image_files.image_model(tmp_path / name)
    assert not image_files.is_image_model(tmp_path / "nowhere.safetensors")


def test_tensors_and_tiles_are_no_steps() -> None:
    counter = _Counter(0, 4, 3)
    told = [
        (1, 688),
        (4, 4),
        (0, 4),
        (2, 4),
        (1, 4),
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
        (0, 4),
        (1, 4),
    ]
    steps = [step.step for pair in told if (step := counter.count(*pair)) is not None]
    assert steps == [0, 1, 2, 3, 4]
    assert [s for s in range(5) if counter.shows(s)] == [1, 2, 3]
    counter = _Counter(0, 4, 0, is_encoding=True)  # a picture, in as many tiles
    assert [counter.count(done, 4) for done in range(5)] == [None] * 5
    counter.begin()
    counted = [counter.count(done, 4) for done in range(5)]
    assert [step and step.step for step in counted] == [0, 1, 2, 3, 4]
    for steps, previews, shown in (
        (20, 2, [7, 14]), (5, 2, [2, 4]), (6, 3, [1, 2, 3]), (2, 3, [1]), (1, 1, []), (9, 0, []),
        (3, 150, [1, 2]), (150, 150, list(range(1, 150))),
    ):  # fmt: skip
        counter = _Counter(0, steps, previews)
        assert [s for s in range(steps + 1) if counter.shows(s)] == shown


def test_lines_are_read_in_any_pieces() -> None:
    events: list[Step | Picture] = [
        Step(0, 1, 9, b"\0abc"),
        Picture(0, 2**53 - 20, 64, 64, bytes(range(256)) * 40),
        Step(1, 0, 9),
    ]
    text = "".join(map(ImageLines.of, events))
    for size in (1, 7, 1000, len(text)):
        lines = ImageLines()
        read = [e for at in range(0, len(text), size) for e in lines.read(text[at : at + size])]
        assert read == events


def test_a_drawing_is_checked() -> None:
    for options in (
        {"width": 64},
        {"width": 65, "height": 64},
        {"seed": 2**53},
        {"seed": 2**53 - 9, "n": 10},
        {"format": "gif"},
    ):
        with pytest.raises(InvalidRequestError):
            Drawing(**options)  # type: ignore[arg-type]


def test_the_largest_seed_gives_all_images(tmp_path: Path) -> None:
    spec = ModelSpec("fake", tmp_path / "fake.safetensors")
    engine = LocalImages(spec, FakePainter(), EngineOptions())
    largest = Drawing(n=3, seed=2**53 - 3)
    lines = ImageLines()
    stream = engine.submit(GenerationRequest("a", prompt="a cat", drawing=largest))
    made = [e for text in stream for e in lines.read(text) if isinstance(e, Picture)]
    assert [picture.seed for picture in made] == [2**53 - 3, 2**53 - 2, 2**53 - 1]
    engine.close()


def test_an_aborted_request_ends_and_others_wait_their_turn(tmp_path: Path) -> None:
    painter = FakePainter()
    painter.gate = threading.Semaphore(0)
    spec = ModelSpec("fake", tmp_path / "fake.safetensors")
    engine = LocalImages(spec, painter, EngineOptions())

    def ask(name: str, prompt: str = "a cat") -> Any:
        return engine.submit(GenerationRequest(name, prompt=prompt, drawing=Drawing(seed=1)))

    first, second, third = ask("a"), ask("b"), ask("c", "crash")
    wait_for(lambda: engine.stats().num_running == 1)
    first.close()
    assert first.wait(30).finish_reason is FinishReason.ABORT
    for _ in range(8):
        painter.gate.release()
    lines = ImageLines()
    assert [type(e).__name__ for text in second for e in lines.read(text)] == [
        *["Step"] * 5,
        "Picture",
    ]
    assert second.result(30).text == second.text == ""  # images are not kept
    with pytest.raises(EngineError, match="SIGKILL"):
        third.result(30)
    with pytest.raises(InvalidRequestError, match="cannot generate text"):
        engine.submit(GenerationRequest("d", prompt="hello"))
    engine.close()


async def test_what_other_dialects_say_of_it(drawn: Drawn) -> None:
    """It has no vocabulary, and they ask for one."""
    shown = await drawn.api.fetch("POST", "/api/show", {"model": "fake"})
    assert shown.code == 200 and json.loads(shown.body)["capabilities"] == ["image"]
    props = json.loads((await drawn.api.fetch("GET", "/props?model=fake")).body)
    assert props["chat_template"] == "" and not any(props["modalities"].values())
