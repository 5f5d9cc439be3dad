"""Reads the body of an exchange: bounded, and without the fields that have no effect.

Tornado loop only; large bodies are parsed on a lane. Knows no dialect: the route gives the schema.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from llmkit.gateway.bodies import check_counts, parse_json, validated
from llmkit.gateway.tolerance import Tolerance
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange

__all__ = ["Admission", "Reading"]

LARGE_BYTES = 128 << 10
Schema = TypeVar("Schema", bound=BaseModel)


# Called when a body names a model, before the route looks for it: to refuse the model to this
# caller, or to load it.
Admission = Callable[["Exchange", str], Awaitable[None]]


class Reading:
    """Reads the body of an exchange; ``admissions`` are called with the model that it names."""

    def __init__(
        self, lanes: Lanes, tolerance: Tolerance, admissions: Sequence[Admission] = ()
    ) -> None:
        self._lanes, self.tolerance, self._admissions = lanes, tolerance, admissions

    async def read(self, exchange: Exchange, schema: type[Schema]) -> Schema:
        """The body as ``schema``. Fields without effect are added to ``exchange.ignored``.

        Raises `InvalidRequestError`, which names the first invalid field, and what the admissions
        raise.
        """
        body = exchange.body
        if len(body) <= LARGE_BYTES:
            value, ignored = self._read(schema, body)
        else:
            value, ignored = await asyncio.wrap_future(
                self._lanes.submit(exchange.caller, lambda: self._read(schema, body))
            )
        exchange.ignored += ignored
        model = getattr(value, "model", None)
        if isinstance(model, str) and getattr(schema, "uses_model", True):
            for admit in self._admissions:
                await admit(exchange, model)
        return value

    def _read(self, schema: type[Schema], body: bytes) -> tuple[Schema, list[str]]:
        check_counts(body)
        data = parse_json(body)
        ignored = self.tolerance.strip(schema, data)
        return validated(schema, data), ignored
