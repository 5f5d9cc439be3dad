"""How large the pictures in an AVIF file are: by its boxes, and by what their decoder will read.

Pure; nothing is decoded. The boxes may say another size than the AV1 data, which is what a decoder
makes room for. Read from ISO/IEC 14496-12 (boxes) and the AV1 specification, 5.3 and 5.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["sizes"]

MAX_BOXES, MAX_ITEMS, MAX_UNITS = 2000, 500, 20_000
SEQUENCE_HEADER = 1
NO_SIZE = "its header gives it no size"


def sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Width and height of all pictures, tiles and masks.

    Raises `ValueError`, `struct.error` and `IndexError` for a broken file.
    """
    if data[8:12] == b"avis":
        raise ValueError("it is an animation. Save it as a still picture")
    meta = next(_within(data, 0, len(data), b"meta"), None)
    if meta is None:
        raise ValueError(NO_SIZE)
    start, end = meta[0] + 4, meta[1]
    for iprp in _within(data, start, end, b"iprp"):
        for ipco in _within(data, *iprp, b"ipco"):
            for at, _ in _within(data, *ipco, b"ispe"):
                yield struct.unpack_from(">II", data, at + 4)
    left = MAX_UNITS
    pictures = {item for item, kind in _kinds(data, start, end) if kind == b"av01"}
    for item, coded in _items(data, start, end):
        if item not in pictures:
            continue
        found = False
        for kind, unit in _units(coded):
            left -= 1
            if left < 0:
                raise ValueError("it has too many parts")
            if kind == SEQUENCE_HEADER:
                found = True
                yield _frame(unit)
        if not found:
            raise ValueError(NO_SIZE)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the boxes in a part of a file."""
    for _ in range(MAX_BOXES):
        if at + 8 > end:
            return
        size, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            size, start = struct.unpack_from(">Q", data, start)[0], start + 8
        stop = end if size == 0 else min(at + size, end)
        if stop < start:
            raise ValueError("its boxes are broken")
        yield name, start, stop
        at = stop


def _within(data: bytes, at: int, end: int, name: bytes) -> Iterator[tuple[int, int]]:
    return ((start, stop) for each, start, stop in _boxes(data, at, end) if each == name)


def _kinds(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The items, and what they are."""
    for start, stop in _within(data, at, end, b"iinf"):
        entries = start + (6 if data[start] == 0 else 8)
        for entry, _ in _within(data, entries, stop, b"infe"):
            if data[entry] == 2:
                yield struct.unpack_from(">H2x4s", data, entry + 4)
            elif data[entry] == 3:
                yield struct.unpack_from(">I2x4s", data, entry + 4)


def _items(data: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The items, and their data."""
    inner, room = next(_within(data, at, end, b"idat"), (0, 0)), 2 * len(data)
    for start, _ in _within(data, at, end, b"iloc"):
        version, lengths = data[start], struct.unpack_from(">H", data, start + 4)[0]
        wide = 2 if version < 2 else 4
        place = Reader(data, start + 6)
        sized = [lengths >> shift & 15 for shift in (12, 8, 4, 0)]
        if version == 0:
            sized[3] = 0
        for _ in range(min(place.number(wide), MAX_ITEMS)):
            item = place.number(wide)
            method = place.number(2) & 15 if version else 0
            place.number(2)
            base, parts = place.number(sized[2]), []
            for _ in range(min(place.number(2), MAX_ITEMS)):
                place.number(sized[3])
                offset, length = place.number(sized[0]), place.number(sized[1])
                offset += base + (inner[0] if method == 1 else 0)
                last = inner[1] if method == 1 else len(data)
                parts.append(data[offset : min(offset + length, last) if length else last])
                room -= len(parts[-1])
                if room < 0:
                    raise ValueError("its items overlap")
            yield item, b"".join(parts)


class Reader:
    """Big-endian numbers, one after the other."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def number(self, size: int) -> int:
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            raise ValueError("its boxes are cut off")
        self._at += size
        return int.from_bytes(part, "big")


def _units(coded: bytes) -> Iterator[tuple[int, bytes]]:
    """The units of AV1 data (OBUs), and their types."""
    at = 0
    while at < len(coded):
        head = coded[at]
        at += 2 if head & 4 else 1
        size = len(coded) - at
        if head & 2:
            size = 0
            for shift in range(0, 56, 7):
                byte = coded[at]
                at += 1
                size |= (byte & 127) << shift
                if not byte & 128:
                    break
        yield head >> 3 & 15, coded[at : at + size]
        at += size


def _frame(unit: bytes) -> tuple[int, int]:
    """The largest frame that a sequence header allows."""
    bits = Bits(unit[:512])
    bits.read(4)  # profile, still picture
    if bits.read(1):  # the short form
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing
        bits.read(64)
        if bits.read(1):
            bits.skip_uvlc()
        if bits.read(1):  # model of a decoder
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5 + 5)
    has_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_delay and bits.read(1):
            bits.read(4)


class Bits:
    """Bits, the highest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        if count > self._left:
            raise ValueError("its header is cut off")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def skip_uvlc(self) -> None:
        zeros = 0
        while not self.read(1):
            zeros += 1
        if zeros < 32:
            self.read(zeros)
