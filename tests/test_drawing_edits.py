"""Images that start from a picture: `/v1/images/edits` with the stock SDK, what is refused, and
what a picture and its mask become."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from drawing import FakePainter, image
from drawing_gateway import Drawn, drawn
from gateway_client import serve
from PIL import Image
from scripted_model import ScriptedModel, ServedModels

import llmkit
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.diffusion.start import Start
from llmkit.drawing import TextToImage
from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.openai import image_objects
from llmkit.media import pictures
from llmkit.media.addresses import digest_of
from llmkit.models.registry import ModelSpec
from llmkit.protocol.images import Drawing
from llmkit.runtime.images import LocalImages
from llmkit.settings.options import EngineOptions

__all__ = ["drawn"]  # a fixture

EDITS = "/v1/images/edits"


def png(width: int = 64, height: int = 64, colour: Any = (200, 0, 0)) -> bytes:
    return pictures.png(np.full((height, width, len(colour)), colour, np.uint8))


def masked(width: int = 64, height: int = 64) -> bytes:
    """Clear in its left half."""
    pixels = np.full((height, width, 4), 255, np.uint8)
    pixels[:, : width // 2, 3] = 0
    return pictures.png(pixels)


def turned() -> bytes:
    """A photo of 60 x 120 pixels that is stored lying."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 60), "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


async def test_a_picture_is_changed_by_the_stock_client(drawn: Drawn) -> None:
    given, mask = png(96, 96), masked(96, 96)
    made = await drawn.client.images.edit(
        model="fake", prompt="a cat", image=("a.png", given), mask=("m.png", mask), n=2,
        output_format="webp", extra_body={"seed": 5, "strength": 0.5, "negative_prompt": "1"},
    )  # fmt: skip
    assert [each.seed for each in made.data or []] == [5, 6]  # type: ignore[attr-defined]
    found = image(base64.b64decode((made.data or [])[0].b64_json or ""))
    assert (found.format, found.size) == ("WEBP", (64, 64))  # square, as large as others
    prompt, asked = drawn.painter.asked[-1]
    assert (prompt, asked.strength, asked.negative_prompt) == ("a cat", 0.5, "1")
    assert drawn.painter.files == {asked.image: given, asked.mask: mask}
    # One picture in a list, without a mask, in a size of its own.
    made = await drawn.client.images.edit(
        model="fake", prompt="7", image=[given], size="192x64", quality="high"  # type: ignore[arg-type]
    )  # fmt: skip
    prompt, asked = drawn.painter.asked[-1]
    assert (prompt, asked.mask, asked.strength) == ("7", "", 0.75)
    assert (asked.width, asked.height) == (192, 64) and drawn.painter.files == {asked.image: given}


async def test_the_result_has_the_shape_of_the_picture(drawn: Drawn) -> None:
    drawn.painter.size = (128, 128)
    for data, size in (
        (png(400, 200), (192, 64)),
        (png(3000, 1), (2048, 64)),
        (turned(), (64, 192)),  # upright, as it is seen
    ):
        await drawn.client.images.edit(model="fake", prompt="a cat", image=data)
        _, asked = drawn.painter.asked[-1]
        assert (asked.width, asked.height) == size


async def test_a_stream_of_an_edit_has_its_own_events(drawn: Drawn) -> None:
    stream = await drawn.client.images.edit(
        model="fake", prompt="a cat", image=png(), stream=True, partial_images=2
    )
    kinds = [event.type async for event in stream]
    assert kinds == [*["image_edit.partial_image"] * 2, "image_edit.completed"]


async def test_what_cannot_be_changed_is_refused(drawn: Drawn) -> None:
    bomb = bytearray(png())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    given = {"image": ("a.png", png()), "prompt": "a cat"}
    for more, param in (
        ({"image": ("a.svg", b"<svg/>")}, "image"),
        ({"image": ("a.png", bytes(bomb))}, "image"),
        ({"image": ("a.png", b"")}, "image"),
        ({"mask": ("m.png", b"GIF")}, "mask"),
        ({"mask": ("m.png", b"")}, "mask"),  # not as if there were none
        ({"mask": ("m.png", png(64, 128, (0, 0, 0, 0)))}, "mask"),
        ({"extra_body": {"strength": 0}}, "strength"),
        ({"extra_body": {"strength": 1.5}}, "strength"),
        ({"image": [("a.png", png()), ("b.png", png())]}, "image"),
        ({"response_format": "url"}, "response_format"),
        ({"prompt": " "}, "prompt"),
        ({"size": "500x500"}, "size"),
        ({"n": 11}, "n"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await drawn.client.images.edit(model="fake", **{**given, **more})
        assert caught.value.param == param, (more, caught.value)
    assert not drawn.painter.asked
    for options in ({"mask": "m"}, {"strength": 0.5}):
        with pytest.raises(InvalidRequestError, match="needs an image"):
            Drawing(**options)  # type: ignore[arg-type]
    code, answer = await drawn.api.post(EDITS, {"prompt": "a cat"})
    assert code == 400 and "multipart/form-data" in answer["error"]["message"]
    code, answer = await drawn.api.post("/v1/images/variations", {})
    assert code == 400 and EDITS in answer["error"]["message"]


async def test_text_of_a_form_stays_as_it_is_written(drawn: Drawn) -> None:
    files = {"image": ("a.png", png())}

    async def edit(**fields: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(drawn.api.url + EDITS, data=fields, files=files)

    given = {"model": "fake", "prompt": "007", "negative_prompt": "1.50", "user": "true"}
    assert (await edit(**given, seed="007", stream="false")).status_code == 200
    prompt, asked = drawn.painter.asked[-1]
    assert (prompt, asked.negative_prompt, asked.seed) == ("007", "1.50", 7)
    reply = await edit(model="2.50", prompt="a cat")
    assert reply.status_code == 404 and "'2.50'" in reply.json()["error"]["message"]
    reply = await edit(model="fake", prompt="a cat", size="512")
    assert reply.status_code == 400
    assert "size: 512 is neither auto nor a size" in reply.json()["error"]["message"]


async def test_files_are_read_once_and_beside_the_loop(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noted(data: bytes) -> str:
        threads.append(threading.current_thread())
        return digest_of(data)

    monkeypatch.setattr(image_objects, "digest_of", noted)
    await drawn.client.images.edit(model="fake", prompt="a cat", image=png(), mask=masked())
    assert len(threads) == 2 and threading.current_thread() not in threads


async def test_a_picture_may_be_larger_than_other_bodies(drawn: Drawn) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    data = pictures.png(noise)
    assert 16 << 20 < len(data) < pictures.MAX_BYTES
    made = await drawn.client.images.edit(model="fake", prompt="a cat", image=data)
    assert made.data
    with pytest.raises(openai.BadRequestError, match="the limit is 20 MB"):
        await drawn.client.images.edit(model="fake", prompt="a cat", image=data + bytes(4 << 20))


def test_a_notebook_gives_pictures_as_it_has_them(tmp_path: Path) -> None:
    painter = FakePainter()
    engine = LocalImages(ModelSpec("fake", tmp_path / "fake.safetensors"), painter, EngineOptions())
    with TextToImage(engine) as sd:
        sd.generate("a cat", image=Image.new("RGB", (64, 64), "red"), strength=0.3)
        _, asked = painter.asked[-1]
        assert pictures.pixels(painter.files[asked.image])[3, 3].tolist() == [255, 0, 0]
        with pytest.raises(InvalidRequestError, match="mask: it has 32x64 pixels"):
            sd.generate("a cat", image=png(), mask=np.zeros((64, 32, 4), np.uint8))
        with pytest.raises(InvalidRequestError, match=r"^image: dict is no picture"):
            sd.generate("a cat", image={})


def test_pictures_go_to_other_processes(tmp_path: Path) -> None:
    """Over a bridge, and over HTTP to a gateway before it."""
    painter = FakePainter()
    engine = LocalImages(ModelSpec("fake", tmp_path / "fake.safetensors"), painter, EngineOptions())
    server = BridgeServer(engine)
    client = BridgeClient(server.connection)
    gateway = ServedModels(tmp_path, client)  # type: ignore[arg-type]
    far: Any = llmkit.attach(gateway.url)
    for near in (TextToImage(client), far):
        near.generate("a cat", image=png(), mask=masked(), strength=0.4)
        _, asked = painter.asked.pop()
        assert painter.files == {asked.image: png(), asked.mask: masked()}
        assert asked.strength == pytest.approx(0.4)
        noise = np.random.default_rng(0).integers(0, 256, (2200, 2200, 3), np.uint8)
        near.generate("a cat", image=noise)  # in base64 more than other bodies may have
        with pytest.raises(InvalidRequestError, match=r"^mask: it has 128x64 pixels"):
            near.generate("a cat", image=png(), mask=masked(128))
    far.unload()
    gateway.stop()
    client.close()
    server.close()
    engine.close()


def test_an_older_gateway_is_told_what_it_would_leave_out(tmp_path: Path) -> None:
    """It would draw the prompt alone, since it knows no such field."""
    older = ScriptedModel("older", image_size="64x64")
    gateway = ServedModels(tmp_path, older)
    far: Any = llmkit.attach(gateway.url)
    with pytest.raises(InvalidRequestError, match=r"^image cannot be read by this model.* older"):
        far.generate("a cat", image=png())
    assert not older.asked
    far.unload()
    gateway.stop()


def start(picture: bytes, mask: bytes = b"", **options: Any) -> Start | None:
    how = {"width": 64, "height": 64, "steps": 20, "strength": 0.5, **options}
    drawing = Drawing(image="i", mask="m" if mask else "", **how)
    return Start.of(drawing, {"i": picture, "m": mask})


def test_what_a_picture_and_its_mask_become() -> None:
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 255  # what is left when both sides are cut off
    begun = start(pictures.png(wide), masked(256, 64), width=64, height=64)
    assert begun is not None and begun.mask is not None
    assert begun.picture.shape == (64, 64, 3) and begun.picture.min() == 255
    assert begun.mask.shape == (64, 64, 1)
    assert begun.mask[:, :31].min() == 255 and begun.mask[:, 33:].max() == 0
    clear = start(png(colour=(9, 9, 9, 0)))
    assert clear is not None and clear.mask is None and clear.picture.min() == 255  # on white
    assert Start.of(Drawing(width=64, height=64), {}) is None
    for mask, reason in ((png(), "none of its pixels are clear"), (png()[:60], "cut off")):
        with pytest.raises(InvalidRequestError, match=f"^mask: .*{reason}"):
            start(png(), mask)
    with pytest.raises(InvalidRequestError, match=r"^image: .*cut off or broken"):
        start(png()[:-30])
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    whole = start(png(), file.getvalue())
    assert whole is not None and whole.mask is not None and whole.mask.min() == 255


def test_weaker_changes_take_fewer_steps() -> None:
    taken = [(20, 0.75, 16), (20, 1.0, 20), (20, 0.99, 20), (4, 0.5, 3), (10, 0.3, 4), (1, 0.5, 1)]
    for steps, strength, expected in taken:
        begun = start(png(), steps=steps, strength=strength)
        assert begun is not None and begun.steps == expected


async def test_without_a_model_the_route_says_what_to_install() -> None:
    async for api in serve(None, directory=EngineDirectory([])):
        client = openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="k", max_retries=0)
        with pytest.raises(openai.NotFoundError, match=r"llmkit\[images\]"):
            await client.images.edit(prompt="a cat", image=png())
        await client.close()
