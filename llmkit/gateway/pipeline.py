"""The stages around every route: context managers, nested in order. Tornado loop only.

The order is identify, limit, trace, meter, run. The caller is already known: an adapter makes the
`Exchange` with its `Identity`. To refuse, a stage raises `ApiError` before it yields; the route's
exception is raised at the yield. What the route did is in `exchange.record`. A stage that waits (a
database, say) is an asynchronous context manager.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager

from llmkit.gateway.access.held import Held
from llmkit.gateway.exchange import ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error

__all__ = ["Observer", "Stage", "accepting", "bounded", "run"]

Stage = Callable[[Exchange], AbstractContextManager[None] | AbstractAsyncContextManager[None]]
Observer = Callable[[Exchange], AbstractContextManager[None]]  # a stage that refuses nothing


async def run(
    stages: Sequence[Stage], route: Callable[[Exchange], Awaitable[None]], exchange: Exchange
) -> None:
    """Run a route within the stages, the first outermost. Raises what they raise."""
    async with contextlib.AsyncExitStack() as entered:
        try:
            for stage in stages:
                manager = stage(exchange)
                if isinstance(manager, AbstractAsyncContextManager):
                    await entered.enter_async_context(manager)
                else:
                    entered.enter_context(manager)
            with exchange.cleanup:
                await route(exchange)
        except BaseException as error:  # before the stages end, which read it
            _note(exchange, error)
            raise


def _note(exchange: Exchange, error: BaseException) -> None:
    """Record the status with which the request will be answered."""
    record = exchange.record
    if isinstance(error, ClientGoneError | asyncio.CancelledError):
        record.status, record.error = 499, "client_gone"
    elif isinstance(error, Exception):
        answer = api_error(error)
        record.status, record.error = answer.status, answer.code or answer.type


def bounded(held: Held) -> Stage:
    """Counts a body as held for its caller until it is answered."""

    @contextlib.contextmanager
    def stage(exchange: Exchange) -> Iterator[None]:
        size = len(exchange.body)
        held.add(exchange.counted_as, size, body=size)
        try:
            yield
        finally:
            held.add(exchange.counted_as, -size)

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
