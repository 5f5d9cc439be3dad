"""Observers that look at a request once it has ended. Tornado loop only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.pipeline import Observer

__all__ = ["after"]

logger = logging.getLogger("llmkit.gateway")


def after(note: Callable[[Exchange], None]) -> Observer:
    """Calls ``note`` with each request that has ended, refused ones included.

    A failure of ``note`` is logged; the request is answered all the same.
    """

    @contextlib.contextmanager
    def observer(exchange: Exchange) -> Iterator[None]:
        try:
            yield
        finally:
            try:
                note(exchange)
            except Exception:
                logger.exception("an observer of requests failed")

    return observer
