"""Single answers through a pool: vectors, and what is asked about a model. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from llmkit.cluster.blame import MAX_DEATHS, Suspect
from llmkit.cluster.members import LOSSES, Leg
from llmkit.cluster.roster import Roster
from llmkit.errors import EngineDiedError, EngineGoneError, QueueFullError
from llmkit.protocol import ListRequests, ListSlots, ListSteps, Question, Unload
from llmkit.protocol.client import EngineClient
from llmkit.protocol.inquiries import RunningRequest, SlotContent, Step

__all__ = ["Asking", "all_of", "merged"]

Found = tuple[int, Any]  # the number of a replica's first slot, and its answer

MAX_TRIES = 10
MAX_IN_COMPANY = 2 * MAX_DEATHS  # then it fails, though others may have been to blame


class Asking:
    """One question, asked again elsewhere when the replica is lost before its answer, or full.

    Only a question whose answer the model ``computes`` shows whether a replica works.
    """

    def __init__(
        self, roster: Roster, ask: Callable[[EngineClient], Future[Any]], *, computes: bool
    ) -> None:
        self._roster, self._ask, self._computes = roster, ask, computes
        self._answer: Future[Any] = Future()
        self._asked: Future[Any] | None = None
        self._avoid: set[str] = set()
        self._suspect = Suspect(object())
        self._tries = 0

    def begin(self) -> Future[Any]:
        """The answer to come. Raises what the first replica raises at once."""
        self._answer.add_done_callback(self._cancelled)
        self._try(None)
        return self._answer

    def _try(self, failure: BaseException | None) -> None:
        while True:
            leg = self._roster.choose_any(self._suspect, self._avoid, is_judged=self._computes)
            self._tries += 1
            if leg is None or leg.member.name in self._avoid or self._tries > MAX_TRIES:
                if leg is not None:
                    self._roster.leave(leg)
                raise failure or EngineGoneError("no replica of this model is there")
            try:
                asked = self._asked = self._ask(leg.client)
            except (*LOSSES, QueueFullError) as error:
                failure = error
                self._left(leg, error)
                continue
            except Exception as error:
                self._roster.leave(leg, failure=error)
                raise
            asked.add_done_callback(partial(self._answered, leg))
            if self._answer.cancelled():
                asked.cancel()
            return

    def _left(self, leg: Leg, error: Exception) -> None:
        """This replica does not answer it, but another may."""
        if isinstance(error, QueueFullError):
            self._roster.leave(leg, failure=error)
        else:
            self._roster.lost(leg, error)
        self._avoid.add(leg.member.name)

    def _answered(self, leg: Leg, asked: Future[Any]) -> None:
        error = None if asked.cancelled() else asked.exception()
        if asked.cancelled() or self._answer.cancelled():
            self._roster.leave(leg)
            self._answer.cancel()
            return
        if isinstance(error, (*LOSSES, QueueFullError)):
            self._left(leg, error)
            suspect = self._suspect
            if suspect.is_guilty or suspect.deaths >= MAX_IN_COMPANY:
                error = EngineDiedError(
                    f"{suspect.deaths} engines ended while they computed this; the last one: "
                    f"{error}"
                )
            else:
                try:
                    return self._try(error)
                except Exception as failure:
                    error = failure
        else:
            failed = error if isinstance(error, Exception) else None
            self._roster.leave(leg, failure=failed, answered=error is None)
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
    merge: Callable[[list[Found]], Any],
) -> Future[Any]:
    """The answers of all that are there, as one; those that are lost meanwhile count for nothing.

    Slots are counted on from one replica to the next. Raises `EngineGoneError` if nobody is there.
    """
    answer: Future[Any] = Future()
    asked: list[Future[Any]] = []
    firsts: list[int] = []  # the number of a replica's first slot
    num_slots = 0
    for client in clients:
        first, num_slots = num_slots, num_slots + client.description.n_slots
        try:
            asked.append(ask(client))
        except LOSSES:
            continue
        firsts.append(first)
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
            (first, f.result())
            for first, f, e in zip(firsts, asked, errors, strict=True)
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


def merged(
    question: Question[Any], moved: Callable[[], Mapping[str, str]]
) -> Callable[[list[Found]], Any] | None:
    """How the answers of all replicas make one; None where any one's will do.

    ``moved`` are the ids of requests at their present replica, and what their readers call them.
    """
    match question:
        case ListRequests():
            return lambda found: _requests(found, moved())
        case ListSteps():
            return lambda found: _steps(found, moved())
        case ListSlots():
            return lambda found: _slots(found, moved())
        case Unload():
            return lambda found: all(answer for _, answer in found)
    return None


def _requests(found: list[Found], names: Mapping[str, str]) -> tuple[RunningRequest, ...]:
    return tuple(
        replace(
            each,
            request=names.get(each.request, each.request),
            slot=None if each.slot is None else first + each.slot,
        )
        for first, answer in found
        for each in answer
    )


def _steps(found: list[Found], names: Mapping[str, str]) -> tuple[Step, ...]:
    steps = [
        replace(
            step,
            chunks=tuple(
                replace(c, slot=first + c.slot, request=names.get(c.request, c.request))
                for c in step.chunks
            ),
        )
        for first, answer in found
        for step in answer
    ]
    return tuple(sorted(steps, key=lambda step: step.at))


def _slots(found: list[Found], names: Mapping[str, str]) -> tuple[SlotContent, ...]:
    return tuple(
        replace(
            each,
            slot=first + each.slot,
            request=None if each.request is None else names.get(each.request, each.request),
        )
        for first, answer in found
        for each in answer
    )
