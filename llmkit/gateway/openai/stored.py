"""Stored responses: each belongs to its caller; all are bounded by their real size in bytes.

Tornado loop only. Turns of a conversation share its beginning: each response holds the JSON of its
own items, and references to that of the responses it continues.
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
    """The items of one response as JSON; ``holders`` counts the kept responses that refer to it."""

    data: bytes = b"[]"
    holders: int = 0


@dataclass(slots=True, eq=False)
class Kept:
    """A stored response, which can be retrieved and continued."""

    owner: str
    response_id: str
    status: str
    before: tuple[Segment, ...]
    response: bytes = b""
    input: Segment = field(default_factory=Segment)
    output: Segment = field(default_factory=Segment)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (*self.before, self.input, self.output)

    @property
    def history(self) -> list[Item]:
        """All items of the conversation."""
        return [item for segment in self.segments for item in json.loads(segment.data)]


class Store:
    """The most recent responses, in memory."""

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
        """Raises `ApiError` if it does not exist or, indistinguishably, is somebody else's."""
        kept = self._kept.get(response_id)
        if kept is not None and kept.owner == owner:
            self._kept.move_to_end(response_id)
            return kept
        if param is not None:
            raise ApiError(
                400,
                f"There is no stored response {response_id!r:.100}.",
                param=param,
                code="previous_response_not_found",
            )
        raise ApiError(
            404,
            f"There is no stored response {response_id!r:.100}: it was never stored, was deleted, "
            "or the server has been restarted.",
            code="not_found",
        )

    def finder(self, owner: str) -> Callable[[str], Item]:
        """A lookup of stored items by id, for one request. The lookup raises `ApiError`.

        Each segment is parsed once. Referenced items are bounded as if they had been sent.
        """
        segments = (
            segment
            for kept in reversed(self._kept.values())
            if kept.owner == owner
            for segment in (kept.output, kept.input)
        )
        known: dict[str, tuple[Item, int]] = {}
        count = size = 0

        def find(item_id: str) -> Item:
            nonlocal count, size
            while item_id not in known:
                segment = next(segments, None)
                if segment is None:
                    raise ApiError(
                        404,
                        f"There is no item {item_id!r:.100}: its response was never stored, was "
                        "deleted, or the server has been restarted.",
                        param="input",
                        code="not_found",
                    )
                for item in json.loads(segment.data):
                    known.setdefault(item.get("id"), (item, len(json.dumps(item))))
            item, length = known[item_id]
            count, size = count + 1, size + length
            if count > MAX_REFERENCES or size > MAX_OWNER_BYTES:
                raise ApiError(
                    400,
                    f"The input references too much; the limit is {MAX_REFERENCES} items and "
                    f"{MAX_OWNER_BYTES >> 20} MiB.",
                    param="input",
                )
            return dict(item)

        return find

    def begin(self, owner: str, response_id: str, items: list[Item], previous: Kept | None) -> Kept:
        """The entry for a new response; `add` it once the response may be kept."""
        return Kept(
            owner,
            response_id,
            "in_progress",
            previous.segments if previous is not None else (),
            input=Segment(json.dumps(items).encode()),
        )

    def add(self, kept: Kept, response: dict[str, Any]) -> bool:
        """Keep a response, or its latest state. False if it is too large."""
        self.remove(kept)
        kept.status = response["status"]
        kept.response = json.dumps(response).encode()
        kept.output = Segment(json.dumps(response["output"]).encode())
        if len(kept.response) + len(kept.input.data) > MAX_RESPONSE_BYTES:
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
        while len(self._kept) > MAX_KEPT or (
            self.num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1
        ):
            self.remove(next(iter(self._kept.values())))

    def remove(self, kept: Kept) -> None:
        """Forget a response; the ones that continue it keep its items."""
        if self._kept.get(kept.response_id) is not kept:
            return
        del self._kept[kept.response_id]
        self._count(kept.owner, -len(kept.response))
        for segment in kept.segments:
            segment.holders -= 1
            if not segment.holders:
                self._count(kept.owner, -len(segment.data))

    def _count(self, owner: str, size: int) -> None:
        total = self._bytes.get(owner, 0) + size
        if total:
            self._bytes[owner] = total
        else:
            self._bytes.pop(owner, None)
