"""Single answers through a pool: vectors, and what is asked about a model. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from llmkit.cluster.relay import LOSSES, MAX_DEATHS, Leg
from llmkit.errors import EngineDiedError, EngineGoneError
from llmkit.protocol import (
    ListRequests,
    ListSlots,
    ListSteps,
    Question,
    Unload,
)
from llmkit.protocol.client import EngineClient

__all__ = ["Asking", "all_of", "merged"]

MAX_TRIES = 10


class Places(Protocol):
    """What is needed of a pool."""

    def any_leg(self, avoid: set[str]) -> Leg | None: ...

    def leave(self, leg: Leg) -> None: ...

    def lost(self, leg: Leg, failure: Exception) -> bool: ...


class Asking:
    """One question, asked again elsewhere when the replica is lost before its answer."""

    def __init__(self, places: Places, ask: Callable[[EngineClient], Future[Any]]) -> None:
        self._places, self._ask = places, ask
        self._answer: Future[Any] = Future()
        self._asked: Future[Any] | None = None
        self._avoid: set[str] = set()
        self._deaths = self._tries = 0

    def begin(self) -> Future[Any]:
        """The answer to come. Raises what the first replica raises at once."""
        self._answer.add_done_callback(self._cancelled)
        self._try(None)
        return self._answer

    def _try(self, failure: BaseException | None) -> None:
        while True:
            leg = self._places.any_leg(self._avoid)
            self._tries += 1
            if leg is None or leg.member in self._avoid or self._tries > MAX_TRIES:
                if leg is not None:
                    self._places.leave(leg)
                raise failure or EngineGoneError("no replica of this model is there")
            try:
                asked = self._asked = self._ask(leg.client)
            except LOSSES as error:
                failure = error
                self._places.lost(leg, error)
                self._avoid.add(leg.member)
                self._places.leave(leg)
                continue
            except BaseException:
                self._places.leave(leg)
                raise
            asked.add_done_callback(partial(self._answered, leg))
            if self._answer.cancelled():
                asked.cancel()
            return

    def _answered(self, leg: Leg, asked: Future[Any]) -> None:
        self._places.leave(leg)
        if asked.cancelled():
            self._answer.cancel()
            return
        error = asked.exception()
        if isinstance(error, LOSSES) and not self._answer.cancelled():
            self._avoid.add(leg.member)
            self._deaths += self._places.lost(leg, error)
            if self._deaths >= MAX_DEATHS:
                error = EngineDiedError(
                    f"{self._deaths} engines ended while they computed this; the last one: {error}"
                )
            else:
                try:
                    return self._try(error)
                except BaseException as failure:
                    error = failure
        if not self._answer.set_running_or_notify_cancel():
            return
        if error is not None:
            self._answer.set_exception(error)
        else:
            self._answer.set_result(asked.result())

    def _cancelled(self, answer: Future[Any]) -> None:
        asked = self._asked
        if answer.cancelled() and asked is not None:
            asked.cancel()


def all_of(
    clients: Sequence[EngineClient],
    ask: Callable[[EngineClient], Future[Any]],
    merge: Callable[[list[Any]], Any],
) -> Future[Any]:
    """The answers of all that are there, as one; those that are lost meanwhile count for nothing.

    Raises `EngineGoneError` if nobody is there.
    """
    answer: Future[Any] = Future()
    asked: list[Future[Any]] = []
    for client in clients:
        try:
            asked.append(ask(client))
        except LOSSES:
            continue
    if not asked:
        raise EngineGoneError("no replica of this model is there")
    lock, left = threading.Lock(), [len(asked)]

    def one_is_done(_: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        errors = [None if f.cancelled() else f.exception() for f in asked]
        found = [
            f.result()
            for f, e in zip(asked, errors, strict=True)
            if e is None and not f.cancelled()
        ]
        if not answer.set_running_or_notify_cancel():
            return
        try:
            if not found:
                raise next((e for e in errors if e), EngineGoneError("no replica answered"))
            answer.set_result(merge(found))
        except BaseException as error:
            answer.set_exception(error)

    for each in asked:
        each.add_done_callback(one_is_done)
    return answer


def merged(question: Question[Any]) -> Callable[[list[Any]], Any] | None:
    """How the answers of all replicas make one; None where any one's will do."""
    match question:
        case ListRequests():
            return lambda found: tuple(each for answer in found for each in answer)
        case ListSteps():
            return lambda found: tuple(sorted((s for a in found for s in a), key=lambda s: s.at))
        case ListSlots():
            return _numbered
        case Unload():
            return all
    return None


def _numbered(found: list[Any]) -> Any:
    """Slots of all replicas, counted on."""
    slots: list[Any] = []
    for answer in found:
        first = len(slots)
        slots += [replace(each, slot=first + each.slot) for each in answer]
    return tuple(slots)
