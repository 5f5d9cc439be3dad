"""Stored responses, as the routes of a caller see them. Tornado loop only.

They are in the database of sessions; its calls run on threads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.errors import NotFoundError
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.openai.item_media import digests_of, together

if TYPE_CHECKING:
    from llmkit.gateway.conversations.shelf import Stores
    from llmkit.store.responses import ResponseStore, StoredResponse

__all__ = ["Kept", "Stored"]

MAX_REFERENCED_BYTES, MAX_REFERENCES = 16 << 20, 1024  # in one request
MAX_RESPONSE_CHARS = 1 << 20
Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """A response that is to be stored: what it is asked with, and what it continues.

    ``files`` has the pictures and sounds that its items name.
    """

    response_id: str
    items: list[Item]
    previous_id: str | None
    before: list[Item]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Stored:
    """The stored responses of a request's caller. Raises `ApiError` where none are kept."""

    def __init__(self, exchange: Exchange) -> None:
        assert exchange.turns is not None
        self._turns, self._owner = exchange.turns, exchange.identity.name

    @property
    def is_on(self) -> bool:
        """Whether responses are kept here."""
        return self._turns.is_on

    async def find(self, response_id: str) -> StoredResponse:
        """Raises `NotFoundError` if it does not exist or, indistinguishably, is somebody else's."""
        owner = self._owner
        return await self._turns.shelf.responses(owner, lambda s: s.find(owner, response_id))

    async def history(self, response_id: str) -> list[Item]:
        """All items of the conversation that a response ends, to be continued.

        Raises `ApiError` unless it is there and over.
        """
        owner = self._owner
        try:
            kept = await self.find(response_id)
            if kept.status not in ("completed", "incomplete"):
                raise ApiError(
                    400,
                    f"The response {response_id!r:.100} cannot be continued: its status is "
                    f"{kept.status}.",
                    param="previous_response_id",
                )
            return await self._turns.shelf.responses(owner, lambda s: s.history(owner, response_id))
        except NotFoundError:
            raise ApiError(
                400,
                f"There is no stored response {response_id!r:.100}.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None

    async def items(self, ids: Sequence[str]) -> dict[str, Item]:
        """Stored items by id, for the references of one request.

        They are bounded as if they had been sent. Raises `ApiError`.
        """
        if not ids:
            return {}
        owner, counts = self._owner, Counter(ids)
        if len(ids) > MAX_REFERENCES:
            raise _too_much()
        try:
            found = await self._turns.shelf.responses(
                owner, lambda s: s.find_items(owner, set(counts))
            )
        except NotFoundError as error:
            raise ApiError(404, str(error), param="input", code="not_found") from None
        size = sum(len(json.dumps(item)) * counts[key] for key, item in found.items())
        if size > MAX_REFERENCED_BYTES:
            raise _too_much()
        return found

    async def input_items(self, response_id: str) -> list[Item]:
        """What a response was asked with."""
        owner = self._owner
        shelf = self._turns.shelf
        items = await shelf.responses(owner, lambda s: s.input_items(owner, response_id))
        if not (digests := digests_of(items)):
            return items
        return together(items, await shelf.look(owner, lambda s: s.media(owner, digests)))

    async def put(self, kept: Kept, response: dict[str, Any]) -> bool:
        """Keep a response, or its latest state. False if it is too large."""
        return await self._turns.shelf.responses(self._owner, self._putting(kept, response))

    def postpone(self, kept: Kept, response: dict[str, Any]) -> None:
        """Keep the end of a stored response once the database takes it, unless it is deleted."""
        owner, response_id = self._owner, kept.response_id
        # The store has what it continues, and its files.
        put = self._putting(Kept(response_id, kept.items, kept.previous_id, []), response)

        def run(stores: Stores) -> None:
            stores.responses.find(owner, response_id)
            put(stores.responses)

        self._turns.shelf.postpone(
            run, lambda stores: stores.responses.give_up(response_id), MAX_RESPONSE_CHARS
        )

    def _putting(self, kept: Kept, response: dict[str, Any]) -> Callable[[ResponseStore], bool]:
        owner = self._owner
        return lambda s: s.put(
            owner,
            kept.response_id,
            response,
            kept.items,
            kept.previous_id,
            kept.before,
            digests_of([*kept.before, *kept.items]),
            kept.files,
        )

    async def delete(self, response_id: str) -> None:
        """Forget a response; the ones that continue it keep its items."""
        owner = self._owner
        await self._turns.shelf.responses(owner, lambda s: s.delete(owner, response_id))


def _too_much() -> ApiError:
    return ApiError(
        400,
        f"The input references too much; the limit is {MAX_REFERENCES} items and "
        f"{MAX_REFERENCED_BYTES >> 20} MiB.",
        param="input",
    )
