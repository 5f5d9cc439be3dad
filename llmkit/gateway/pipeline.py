"""The stages around every route: context managers, nested in order. Tornado loop only.

The order is identify, limit, trace, meter, run. The caller is already known: an adapter makes the
`Exchange` with its `Identity`. To refuse, a stage raises `ApiError` before it yields; the route's
exception is raised at the yield.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from llmkit.gateway.access.held import Held
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError

__all__ = ["Stage", "accepting", "bounded", "run"]

Stage = Callable[[Exchange], AbstractContextManager[None]]


async def run(
    stages: Sequence[Stage], route: Callable[[Exchange], Awaitable[None]], exchange: Exchange
) -> None:
    """Run a route within the stages, the first outermost. Raises what they raise."""
    with contextlib.ExitStack() as entered:
        for stage in stages:
            entered.enter_context(stage(exchange))
        await route(exchange)


def bounded(held: Held) -> Stage:
    """Counts a body as held for its caller until it is answered."""

    @contextlib.contextmanager
    def stage(exchange: Exchange) -> Iterator[None]:
        size = len(exchange.body)
        held.add(exchange.caller, size, body=size)
        try:
            yield
        finally:
            held.add(exchange.caller, -size)

    return stage


def accepting(is_draining: Callable[[], bool]) -> Stage:
    """Refuses new work while the server shuts down."""

    @contextlib.contextmanager
    def stage(exchange: Exchange) -> Iterator[None]:
        if is_draining() and exchange.method == "POST":
            message = "This server is shutting down; send the request again."
            raise ApiError(
                503, message, "server_error", code="shutting_down", headers={"Retry-After": "5"}
            )
        yield

    return stage
