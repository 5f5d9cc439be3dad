"""What callers have used, by day and model: for each its own, for administrators everybody's.

As JSON, and for browsers as a page. Tornado loop only; the database is read on a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.clock import SteadyClock
from llmkit.gateway.access.identity import ADMIN, Identity
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.gateway.web import usage_page
from llmkit.store.records import Spending

if TYPE_CHECKING:
    from llmkit.store.usage import UsageWriter

__all__ = ["UsageRoutes"]

DAYS, MOST_DAYS = 30, 366
DAYS_QUERY = Query.number("days", "How many days to look back, today included.", MOST_DAYS, DAYS)
Row = tuple[str, date, str, Spending]


class UsageRoutes:
    """`/usage` over what ``usage`` has written down and is about to."""

    def __init__(self, usage: UsageWriter, clock: SteadyClock) -> None:
        self._usage, self._clock = usage, clock

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/usage", self.own, "What you have used, and may", query=(DAYS_QUERY,)),
            Route(
                "GET",
                "/usage/all",
                self.everybody,
                "What all callers have used",
                scope=ADMIN,
                query=(DAYS_QUERY,),
            ),
        ]

    async def own(self, exchange: Exchange) -> None:
        """The caller's; a page has everybody's too, for whoever may see it."""
        days, identity = _days(exchange), exchange.identity
        own = await self._read(days, identity.name)
        if not exchange.wants_page:
            exchange.send_json(self._object(days, own) | self._allowed(identity))
            return
        is_admin = ADMIN in identity.scopes
        every = await self._read(days, None) if is_admin else []
        text = usage_page(
            self._object(days, own) | self._allowed(identity),
            self._object(days, every, names=True) if is_admin else None,
            base="../" if exchange.path_ends_with_slash else "",
            has_login=exchange.has_login,
        )
        exchange.send_page(text, headers={"Cache-Control": "no-store"}, has_assets=True)

    async def everybody(self, exchange: Exchange) -> None:
        days = _days(exchange)
        exchange.send_json(self._object(days, await self._read(days, None), names=True))

    async def _read(self, days: int, caller: str | None) -> list[Row]:
        return await asyncio.to_thread(self._usage.rows, self._since(days), caller)

    def _since(self, days: int) -> date:
        return self._clock.today() - timedelta(days=days - 1)

    def _object(self, days: int, rows: Sequence[Row], *, names: bool = False) -> dict[str, Any]:
        total = Spending()
        for _, _, _, spending in rows:
            total.add(spending)
        return {
            "object": "usage",
            "days": days,
            "since": self._since(days).isoformat(),
            "total": _counts(total),
            "data": [
                ({"caller": caller} if names else {})
                | {"day": day.isoformat(), "model": model}
                | _counts(spending)
                for caller, day, model, spending in rows
            ],
        }

    def _allowed(self, identity: Identity) -> dict[str, Any]:
        """Who the caller is, and what it may use."""
        allowance = identity.allowance
        limits = {
            name: getattr(allowance, name)
            for name in (
                "rate", "concurrent", "tokens_in_24h", "tokens_per_day", "tokens_per_month"
            )
        }  # fmt: skip
        most = allowance.tokens_in_24h
        window = None
        if most is not None:
            used, free_s = self._usage.in_window(identity.name, most)
            free_at = datetime.fromtimestamp(self._clock.now() + free_s, UTC)
            window = {
                "used": used,
                "left": max(0, most - used),
                "free_at": f"{free_at:%Y-%m-%dT%H:%M:%SZ}" if used >= most else None,
            }
        groups = sorted(identity.groups)
        return {"caller": identity.name, "groups": groups, "limits": limits, "window": window}


def _counts(spending: Spending) -> dict[str, Any]:
    counts = asdict(spending)
    counts["seconds"] = round(spending.seconds, 3)
    return counts | {"total_tokens": spending.total_tokens}


def _days(exchange: Exchange) -> int:
    text = exchange.query("days") or str(DAYS)
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= MOST_DAYS):
        raise InvalidRequestError(f"days: must be a number from 1 to {MOST_DAYS}.", "days")
    return int(text)
