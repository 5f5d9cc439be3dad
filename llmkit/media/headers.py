"""What kind of picture a file is and how large, from its first bytes. Pure: nothing is decoded.

The bytes are a stranger's. What a header says bounds what a decoder may be asked to do, so it is
read before any decoder sees the file. Pillow walks over the parts of a file in Python, microseconds
for each, so their number is bounded too.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from llmkit.media.avif import sizes

__all__ = ["FORMATS", "Facts", "facts_of", "format_of"]

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "AVIF")
MAX_PARTS = 20_000  # segments, chunks or blocks of a file
MAX_STRAY = 20_000  # bytes that belong to none of them
TOO_MANY = "it has too many parts"
_FILL = re.compile(rb"\xff*+")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers that hold a size
# And those behind which Pillow reads no length.
_ALONE = frozenset((0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))


@dataclass(frozen=True, slots=True)
class Facts:
    """A picture's format, one of `FORMATS`, and its size in pixels, as it is stored."""

    format: str
    width: int
    height: int


def format_of(data: bytes) -> str | None:
    """The format by the first bytes; None if it is none of `FORMATS`."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "BMP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
    return None


def facts_of(data: bytes) -> Facts | None:
    """Format and size; None if the header says none. Raises `ValueError` for a broken one."""
    kind = format_of(data)
    if kind is None:
        return None
    try:
        width, height = _SIZES[kind](data)
    except (struct.error, IndexError) as error:
        raise ValueError("its header is cut off") from error
    if width < 1 or height < 1:
        raise ValueError("its header gives it no size")
    return Facts(kind, width, height)


def _jpeg(data: bytes) -> tuple[int, int]:
    at, stray, size = 2, 0, None
    for _ in range(MAX_PARTS):
        start = data.find(b"\xff", at)
        fill = None if start < 0 else _FILL.match(data, start)
        if fill is None or fill.end() == len(data):
            raise ValueError("its header is cut off")
        stray += fill.end() - 1 - at
        if stray > MAX_STRAY:
            raise ValueError(TOO_MANY)
        at, marker = fill.end() + 1, data[fill.end()]
        if marker in _ALONE:
            continue
        if marker == 0xDA:  # the picture begins
            if size is None:
                raise ValueError("its header gives it no size")
            return size
        if marker in _FRAMES and size is None:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = width, height
        at += struct.unpack_from(">H", data, at)[0]
    raise ValueError(TOO_MANY)


def _png(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("its header is no PNG's")
    at = 8
    for _ in range(MAX_PARTS):
        if at + 12 > len(data) or data[at + 4 : at + 8] == b"IEND":
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        at += 12 + struct.unpack_from(">I", data, at)[0]
    raise ValueError(TOO_MANY)


def _webp(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        sides = struct.unpack_from("<HBHB", data, 24)
        return 1 + sides[0] + (sides[1] << 16), 1 + sides[2] + (sides[3] << 16)
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("its header is no WebP's")


def _gif(data: bytes) -> tuple[int, int]:
    at = 13 + (3 << 1 + (data[10] & 7) if data[10] & 128 else 0)
    is_inside = False  # of an extension, whose blocks end with an empty one
    for _ in range(MAX_PARTS):
        if is_inside:
            is_inside, at = data[at] > 0, at + 1 + data[at]
        elif data[at] == 0x21:
            is_inside, at = True, at + 2
        elif data[at] in (0x2C, 0x3B):  # a frame, or the end
            width, height = struct.unpack_from("<HH", data, 6)
            return width, height
        else:
            at += 1
    raise ValueError(TOO_MANY)


def _bmp(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return width, height
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # negative where rows go down


def _avif(data: bytes) -> tuple[int, int]:
    """The largest of the sizes in it, since a decoder may make room for each."""
    found = list(sizes(data))
    return max((w for w, _ in found), default=0), max((h for _, h in found), default=0)


_SIZES = {"JPEG": _jpeg, "PNG": _png, "WebP": _webp, "GIF": _gif, "BMP": _bmp, "AVIF": _avif}
