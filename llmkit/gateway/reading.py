"""Bodies as schemas: bounded before they are read, large ones on another thread, and without the fields that change nothing. Tornado loop only."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from llmkit.errors import InvalidRequestError
from llmkit.gateway.schemas import parse_json, validated
from llmkit.gateway.tolerance import Tolerance
from llmkit.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange

__all__ = ["Reading", "check_counts"]

LARGE_BYTES = 128 << 10
MOST = {"lists and objects": (b"[{", 50_000), "commas": (b",", 1_000_000), "fields": (b":", 200_000)}  # in texts there may be any number
TEXTS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # also one that does not end: a match that fails would be tried from every quote
Schema = TypeVar("Schema", bound=BaseModel)


def check_counts(body: bytes) -> None:
    """Refuse what would take long to read for nothing. Raises `InvalidRequestError`.

    >>> check_counts(b"[" * 100_000)
    Traceback (most recent call last):
    ...
    llmkit.errors.InvalidRequestError: The body holds 100000 lists and objects; at most 50000 are read.
    """
    if all(_count(body, signs) <= most for signs, most in MOST.values()):
        return
    bare = TEXTS.sub(b"", body)
    for name, (signs, most) in MOST.items():
        count = _count(bare, signs)
        if count > most:
            raise InvalidRequestError(f"The body holds {count} {name}; at most {most} are read.")


def _count(body: bytes, signs: bytes) -> int:
    return sum(body.count(sign) for sign in signs)


class Reading:
    """Reads the body of an exchange."""

    def __init__(self, lanes: Lanes, tolerance: Tolerance) -> None:
        self._lanes, self.tolerance = lanes, tolerance

    async def read(self, exchange: Exchange, schema: type[Schema]) -> Schema:
        """The body as ``schema``; what is accepted without effect is named in ``exchange.ignored``.

        Raises `InvalidRequestError` that names the first field that is wrong.
        """
        body = exchange.body
        if len(body) <= LARGE_BYTES:
            found, ignored = self._read(schema, body)
        else:
            found, ignored = await asyncio.wrap_future(self._lanes.submit(exchange.caller, lambda: self._read(schema, body)))
        exchange.ignored += ignored
        return found

    def _read(self, schema: type[Schema], body: bytes) -> tuple[Schema, list[str]]:
        check_counts(body)
        data = parse_json(body)
        ignored = self.tolerance.strip(schema, data)
        return validated(schema, data), ignored
