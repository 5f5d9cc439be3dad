"""Stored responses: each belongs to its caller, and all are bounded by the bytes that they really take. Tornado loop only.

A conversation of many turns shares its beginning: each response holds the JSON of its own items and refers to that of the responses that it continues.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmkit.gateway.failures import ApiError

__all__ = ["Kept", "Store"]

MAX_KEPT, MAX_KEPT_BYTES, MAX_OWNER_BYTES, MAX_RESPONSE_BYTES = 1000, 64 << 20, 16 << 20, 1 << 20
MAX_REFERENCES = 1024  # in one request
Item = dict[str, Any]


@dataclass(slots=True, eq=False)
class Segment:
    """The items of one response, as JSON; ``holders`` are the kept responses whose conversation it is part of."""

    data: bytes = b"[]"
    holders: int = 0


@dataclass(slots=True, eq=False)
class Kept:
    """A response that can be looked up and continued."""

    owner: str
    response_id: str
    status: str
    before: tuple[Segment, ...]
    response: bytes = b""
    given: Segment = field(default_factory=Segment)
    made: Segment = field(default_factory=Segment)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (*self.before, self.given, self.made)

    @property
    def history(self) -> list[Item]:
        """The items of the whole conversation."""
        return [item for segment in self.segments for item in json.loads(segment.data)]


class Store:
    """The newest responses, in memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes: dict[str, int] = {}  # by owner

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def find(self, owner: str, response_id: str, param: str | None = None) -> Kept:
        """Raises `ApiError` for one that is not there, or belongs to somebody else, which looks the same."""
        kept = self._kept.get(response_id)
        if kept is not None and kept.owner == owner:
            self._kept.move_to_end(response_id)
            return kept
        if param is not None:
            raise ApiError(400, f"There is no response {response_id!r:.100} to continue.", param=param, code="previous_response_not_found")
        raise ApiError(404, f"There is no response {response_id!r:.100}: it was not stored, was deleted, or the server was restarted.", code="not_found")

    def finder(self, owner: str) -> Callable[[str], Item]:
        """Gives items of kept responses by their ids, for one request: each segment is read once, and what is referred to is bounded as if it had been sent.
        It raises `ApiError`."""
        segments = (segment for kept in reversed(self._kept.values()) if kept.owner == owner for segment in (kept.made, kept.given))
        known: dict[str, tuple[Item, int]] = {}
        count = size = 0

        def find(item_id: str) -> Item:
            nonlocal count, size
            while item_id not in known:
                segment = next(segments, None)
                if segment is None:
                    message = f"There is no item {item_id!r:.100}: its response was not stored, was deleted, or the server was restarted."
                    raise ApiError(404, message, param="input", code="not_found")
                for item in json.loads(segment.data):
                    known.setdefault(item.get("id"), (item, len(json.dumps(item))))
            item, length = known[item_id]
            count, size = count + 1, size + length
            if count > MAX_REFERENCES or size > MAX_OWNER_BYTES:
                raise ApiError(400, f"The input refers to too much: at most {MAX_REFERENCES} items, and {MAX_OWNER_BYTES >> 20} MiB.", param="input")
            return dict(item)

        return find

    def begin(self, owner: str, response_id: str, given: list[Item], previous: Kept | None) -> Kept:
        """What a new response will be kept as; `add` it when it is sure."""
        return Kept(owner, response_id, "in_progress", previous.segments if previous is not None else (), given=Segment(json.dumps(given).encode()))

    def add(self, kept: Kept, response: dict[str, Any]) -> bool:
        """Keep a response, or what has become of it. False: it is too large."""
        self.remove(kept)
        kept.status = response["status"]
        kept.response = json.dumps(response).encode()
        kept.made = Segment(json.dumps(response["output"]).encode())
        if len(kept.response) + len(kept.given.data) > MAX_RESPONSE_BYTES:
            return False
        for segment in kept.segments:
            if not segment.holders:
                self._count(kept.owner, len(segment.data))
            segment.holders += 1
        self._count(kept.owner, len(kept.response))
        self._kept[kept.response_id] = kept
        self._make_room(kept)
        return kept.response_id in self._kept

    def _make_room(self, newest: Kept) -> None:
        while self._bytes.get(newest.owner, 0) > MAX_OWNER_BYTES:
            self.remove(next(k for k in self._kept.values() if k.owner == newest.owner))
        while len(self._kept) > MAX_KEPT or (self.num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            self.remove(next(iter(self._kept.values())))

    def remove(self, kept: Kept) -> None:
        """Forget a response; responses that continue it keep what they need."""
        if self._kept.get(kept.response_id) is not kept:
            return
        del self._kept[kept.response_id]
        self._count(kept.owner, -len(kept.response))
        for segment in kept.segments:
            segment.holders -= 1
            if not segment.holders:
                self._count(kept.owner, -len(segment.data))

    def _count(self, owner: str, size: int) -> None:
        held = self._bytes.get(owner, 0) + size
        if held:
            self._bytes[owner] = held
        else:
            self._bytes.pop(owner, None)
