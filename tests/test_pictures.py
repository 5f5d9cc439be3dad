"""Picture files to pixels: all formats alike, and hostile ones refused at no cost."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from pictures import RED, bomb, picture
from PIL import Image

from llmkit.errors import InvalidRequestError
from llmkit.media import pictures, sounds
from llmkit.media.headers import Facts

GROWTH_MB = 50


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """Colours that no step of a lossless way may change, and no symmetry."""
    generator = np.random.default_rng(1)
    colours = generator.integers(0, 256, (12, 3), dtype=np.uint8)
    return Image.fromarray(colours[generator.integers(0, 12, (30, 50))])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
    ],
)
def test_lossless_formats_have_the_same_pixels(
    scene: Image.Image, kind: str, options: dict[str, Any]
) -> None:
    data = saved(scene.quantize(12) if kind == "GIF" else scene, kind, **options)
    assert pictures.facts(data).width == 50
    assert np.array_equal(pictures.pixels(data), np.asarray(scene))


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("AVIF", {})]
)
def test_lossy_formats_have_nearly_the_same(kind: str, options: dict[str, Any]) -> None:
    data = saved(Image.new("RGB", (40, 30), (200, 40, 90)), kind, quality=95, **options)
    assert np.abs(pictures.pixels(data).astype(int) - (200, 40, 90)).max() < 6


def test_modes_become_the_plain_picture(scene: Image.Image) -> None:
    plain = np.asarray(scene)
    grey = scene.convert("L")
    clear = scene.convert("RGBA")
    clear.putalpha(0)
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    palette = scene.quantize(12)
    expected = np.stack([np.asarray(grey)] * 3, axis=2)
    assert np.array_equal(pictures.pixels(saved(scene.convert("RGBA"), "PNG")), plain)
    assert np.array_equal(pictures.pixels(saved(palette, "PNG")), plain)
    assert np.array_equal(pictures.pixels(saved(grey, "PNG")), expected)
    assert np.array_equal(pictures.pixels(saved(deep, "PNG")), expected)
    assert (pictures.pixels(saved(clear, "PNG")) == 255).all()
    assert (pictures.pixels(saved(clear, "WEBP", lossless=True)) == 255).all()
    holes = np.array([[0, 257], [514, 0]], np.uint16)
    seen = pictures.pixels(saved(Image.fromarray(holes), "PNG", transparency=0))
    assert seen[..., 0].tolist() == [[255, 1], [2, 255]]
    assert pictures.pixels(saved(scene.convert("CMYK"), "JPEG")).shape == plain.shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_camera_is_turned_back(scene: Image.Image, orientation: int) -> None:
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Pillow's ways to turn
    turned = scene
    if orientation > 1:
        turned = scene.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = saved(turned, kind, exif=exif, **options)
        assert np.array_equal(pictures.pixels(data), np.asarray(scene))
    broken = saved(scene, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(pictures.pixels(broken), np.asarray(scene))


def test_of_an_animation_the_first_frame_is_seen(scene: Image.Image) -> None:
    other = Image.new("RGB", scene.size, RED)
    data = saved(scene.quantize(12), "GIF", save_all=True, append_images=[other])
    assert np.array_equal(pictures.pixels(data), np.asarray(scene))


def test_smaller_pictures(scene: Image.Image) -> None:
    small = saved(scene, "PNG")
    assert pictures.reduced(small, 50) is small
    reduced = pictures.facts(pictures.reduced(picture(RED, (3000, 40)), 512))
    assert reduced == Facts("PNG", 512, 7)
    noise = np.random.default_rng(2).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    thumbnail = pictures.thumbnail(pictures.png(noise))
    assert len(thumbnail) < 20_000 and pictures.facts(thumbnail).width == 112


def lying_avif() -> bytes:
    """An AVIF whose boxes give it 16 pixels a side, and its data seven thousand."""
    data = saved(Image.new("L", (7000, 7000)), "AVIF", speed=10)
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", 16, 16) + data[at + 8 :]


def tall_gif() -> bytes:
    """A GIF of 8 × 8 whose first frame is far larger."""
    data = bytearray(saved(Image.new("L", (8, 8)), "GIF"))
    at = data.index(b"\x2c\0\0\0\0") + 5
    data[at : at + 4] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def many_scans() -> bytes:
    data = saved(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    return data[:-2] + scan * 200 + data[-2:]


def test_a_video_behind_a_photo_is_no_scan() -> None:
    """As phones put it there; by chance it has many markers, but no header."""
    photo = saved(Image.new("RGB", (64, 64), (200, 40, 90)), "JPEG", quality=95)
    video = b"\0\0\0\x18ftypmp42" + np.random.default_rng(5).bytes(8_000_000)
    assert video.count(b"\xff\xda") > pictures.MAX_SCANS
    assert np.array_equal(pictures.pixels(photo + video), pictures.pixels(photo))
    whole = many_scans()
    with pytest.raises(InvalidRequestError, match="scans"):
        pictures.facts(whole)
    with pytest.raises(InvalidRequestError, match="scans"):
        pictures.facts(photo[:-2] + whole[whole.index(b"\xff\xda") :] + video)


def padded(kind: str, part: bytes, before: bytes, count: int = 300_000) -> bytes:
    """A picture with many parts, or stray bytes, before one of its own."""
    data = saved(Image.new("RGB", (4, 4)), kind)
    at = data.index(before) - (4 if kind == "PNG" else 0)
    return data[:at] + part * count + data[at:]


TIME = b"\0\0\0\0tIME" + struct.pack(">I", zlib.crc32(b"tIME"))


def cut(kind: str, **options: Any) -> bytes:
    noise = np.random.default_rng(3).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind, **options)
    return data[: len(data) * 2 // 3]


HOSTILE = {
    "a bomb": bomb,
    "a lying AVIF": lying_avif,
    "a GIF larger than it says": tall_gif,
    "a JPEG of many scans": many_scans,
    "SVG": lambda: b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "HTML": lambda: b"\n<!DOCTYPE html><html></html>",
    "HTML behind a PNG's beginning": lambda: b"\x89PNG\r\n\x1a\n<html></html>",
    "nothing": lambda: b"",
    "a text": lambda: b"hello",
    "TIFF": lambda: saved(Image.new("RGB", (4, 4)), "TIFF"),
    "an icon": lambda: saved(Image.new("RGB", (16, 16)), "ICO"),
    "too many bytes": lambda: picture() + bytes(pictures.MAX_BYTES),
    "only markers": lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 2_000_000,
    "only fill bytes": lambda: b"\xff\xd8" + b"\xff" * 5_000_000,
    # What comes behind the size, but costs a decoder's Python as much.
    "a JPEG of many segments": lambda: padded("JPEG", b"\xff\xe5\0\2", b"\xff\xda"),
    "a JPEG of many tables": lambda: padded("JPEG", b"\xff\xdb\0\2", b"\xff\xda"),
    "a JPEG of stray bytes": lambda: padded("JPEG", b"\0", b"\xff\xda"),
    "a JPEG of fill bytes": lambda: padded("JPEG", b"\xff", b"\xff\xda"),
    "a JPEG of long segments that Pillow does not skip": lambda: padded(
        "JPEG", b"\xff\xf0\xff\xff" + bytes(0xFFFD), b"\xff\xda", 20
    ),
    "a PNG of many chunks": lambda: padded("PNG", TIME, b"IDAT"),
    "a PNG of many chunks at its end": lambda: padded("PNG", TIME, b"IEND"),
    "a GIF of many comments": lambda: padded("GIF", b"\x21\xfe\1a\0", b"\x2c\0\0\0\0"),
    "a GIF of a long comment": lambda: padded(
        "GIF", b"\x21\xfe" + b"\1a" * 300_000 + b"\0", b"\x2c\0\0\0\0", 1
    ),
    "a GIF of stray bytes": lambda: padded("GIF", b"\0", b"\x2c\0\0\0\0"),
    **{f"a cut {kind}": (lambda kind=kind: cut(kind)) for kind in
       ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_no_cost(name: str) -> None:
    data = HOSTILE[name]()
    pictures.pixels(picture())  # what is needed is imported
    script = (
        "import sys, resource\n"
        "from PIL import Image\n"
        "from llmkit.errors import InvalidRequestError\n"
        "from llmkit.media import pictures\n"
        "Image.init()\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    pictures.pixels(data)\n"
        "    print('it was read')\n"
        "except InvalidRequestError as error:\n"
        "    print('refused', error)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, timeout=120, check=True
    )
    said, grown = done.stdout.decode().strip().split("\n")
    assert said.startswith("refused") and " at 0x" not in said
    assert int(grown) / 1024 < GROWTH_MB


def test_what_is_no_sound_of_a_message() -> None:
    for data in (b"", b"hello", picture(), bytes(30_000_000)):
        with pytest.raises(InvalidRequestError):
            sounds.check(data)
