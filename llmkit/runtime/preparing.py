"""`Preparing`: a request that is aborted while it is read goes no further. Any thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from llmkit.errors import EngineError

__all__ = ["Preparing"]


class Preparing:
    """The ids of the requests that are being rendered, tokenized and given grammars.

    >>> preparing = Preparing()
    >>> with preparing(["a"]) as check:
    ...     preparing.abort("a")
    ...     check()
    Traceback (most recent call last):
    ...
    llmkit.errors.EngineError: this request was aborted while it was prepared
    """

    def __init__(self) -> None:
        self._ids: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, ids: Iterable[str]) -> Iterator[Callable[[], None]]:
        """What it yields is to be called between steps; raises `EngineError` once all the ids are
        aborted."""
        mine = set(ids)
        self._ids.update(mine)

        def check() -> None:
            if self._ids.isdisjoint(mine):
                raise EngineError("this request was aborted while it was prepared")

        try:
            yield check
        finally:
            self._ids.difference_update(mine)

    def abort(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        self._ids.discard(request_id)
