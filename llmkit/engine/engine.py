"""The engine thread: the only caller of the runner. Other threads put messages in the inbox and
read frozen snapshots."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from llmkit.engine.admission import Admission, MakeWay
from llmkit.engine.batch import Batch
from llmkit.engine.budget import StepClock
from llmkit.engine.drafter import ModelDrafter
from llmkit.engine.encoding import Encoded, Encoder, Encodings
from llmkit.engine.journal import Journal, requests_of, slots_of
from llmkit.engine.request import Request
from llmkit.engine.runner import ModelRunner
from llmkit.engine.scheduler import Scheduler
from llmkit.engine.slots import PrefixCache
from llmkit.engine.stats import StatsCounter
from llmkit.engine.threads import ThreadGovernor
from llmkit.errors import (
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.protocol import EngineStats, FinishReason, RunningRequest, SlotContent, Step

__all__ = ["Engine"]

logger = logging.getLogger("llmkit.engine")

FAREWELL_S = 3.0  # for saving idle prefixes to disk at shutdown
HELD_S = 0.002  # polling interval while every running request waits for its grammar


class Engine:
    """Continuous batching over one `ModelRunner`; ``submit`` and ``abort`` are thread-safe and
    return immediately.

    ``is_end`` identifies end-of-generation tokens. ``n_ctx`` (at most the runner's) ends a request
    that reaches it. ``max_waiting`` bounds the queue, which callers share (see `Admission`).
    ``target_itl_s`` is the inter-token latency that others' prompts must not exceed.
    ``deterministic`` and ``max_running``: see `Scheduler`. ``turns`` is held while a step computes.
    When idle, the first request waits ``batch_wait_s`` for others, to be computed with them.
    ``encoder`` makes embeddings of images and sounds, of which ``encoded_bytes`` are kept.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        is_end: Callable[[int], bool],
        n_ctx: int | None = None,
        max_waiting: int = 1024,
        target_itl_s: float | None = None,
        deterministic: bool = False,
        turns: AbstractContextManager[None] | None = None,
        drafter: ModelDrafter | None = None,
        context_shift: bool = False,
        max_running: int | None = None,
        batch_wait_s: float = 0.0,
        encoder: Encoder | None = None,
        encoded_bytes: int = 0,
    ) -> None:
        self._runner = runner
        self._batch_wait_s = batch_wait_s
        self._admission = Admission(max_waiting)
        self._turns = turns or contextlib.nullcontext()
        cache = PrefixCache(
            runner.n_slots,
            can_truncate=runner.can_truncate,
            can_fork=runner.can_fork,
            host_tokens=runner.host_tokens,
        )
        for entry in runner.saved():
            cache.add_saved(*entry)
        self._clock = StepClock(target_itl_s)
        self._governor = ThreadGovernor(runner.num_threads, runner.set_threads)
        self._scheduler = Scheduler(
            cache,
            n_ctx=n_ctx or runner.n_ctx,
            max_batch_tokens=runner.max_batch_tokens,
            is_end=is_end,
            clock=self._clock,
            capacity=runner.capacity,
            tile=runner.tile,
            can_coalesce=runner.can_fork and runner.can_truncate,
            can_draft=runner.can_truncate,
            deterministic=deterministic,
            drafter=drafter,
            context_shift=context_shift,
            max_running=max_running,
            on_leave=lambda request: self._admission.leave(request.caller),
            encodings=Encodings(encoder, encoded_bytes, lambda done: self._inbox.put(done)),
        )
        self._is_stuck = False  # all that runs waits for encodings: only a message changes that
        self._most = self._scheduler.max_running
        self._cache, self._journal = cache, Journal()
        self._drafter = drafter
        self._drafted_s = 0.0  # drafter seconds already counted
        self._stats = StatsCounter(
            cache, self._scheduler, runner.capacity or runner.n_slots * runner.n_ctx, self._clock
        )
        self._inbox: queue.SimpleQueue[Request | MakeWay | Encoded | str | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._closed = False
        self._failure: str | None = None
        # Whose tokens the running step computes, and whose abort has arrived: a step is interrupted
        # only if no other request loses tokens. The garbage collector may abort within the lock.
        self._step_lock = threading.RLock()
        self._in_step: frozenset[str] = frozenset()
        self._aborted: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="llmkit-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        return self._stats.snapshot

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def failure(self) -> str | None:
        """Why the engine ended by itself; None while it works, and after ``close``."""
        return self._failure

    def submit(self, *requests: Request) -> None:
        """Queue requests of one caller: all, or none.

        Raises `ModelUnloadedError` after ``close``, and `QueueFullError` when ``max_waiting``
        requests are waiting.
        """
        with self._lock:
            if self._closed:
                raise ModelUnloadedError(
                    self._failure or "the model was unloaded; load it again with llmkit.load()"
                )
            displaced = self._admission.enter(requests[0].caller, len(requests)) if requests else []
            for caller in displaced:
                self._inbox.put(MakeWay(caller))
            for request in requests:
                self._inbox.put(request)

    def steps(self) -> tuple[Step, ...]:
        """The last steps, oldest first."""
        return self._journal.steps()

    def slots(self) -> tuple[SlotContent, ...]:
        """What each slot holds."""
        return slots_of(self._cache, self._scheduler.running)

    def requests(self) -> tuple[RunningRequest, ...]:
        """The running requests."""
        return requests_of(self._scheduler.running, self._scheduler.encodings.blocks)

    def abort(self, request_id: str) -> None:
        """End a request early. A step is interrupted only if all its requests are aborted; tokens
        of others would be lost."""
        with self._step_lock:
            self._aborted.add(request_id)
            # Second, or the engine could discard the id before it is added.
            self._inbox.put(request_id)
            if self._in_step and self._in_step <= self._aborted:
                self._runner.interrupt()

    def close(self, timeout: float = 5.0) -> bool:
        """Stop the thread; running requests are aborted. False if it did not stop in time: the
        runner must not be freed then."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        if threading.current_thread() is self._thread:
            return False
        end = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < end:
            self._runner.interrupt()
            if self._drafter is not None:
                self._drafter.interrupt()
            self._thread.join(0.05)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: Exception = ModelUnloadedError("the model was unloaded while this request ran")
        try:
            while self._take_messages():
                if self._has_work:
                    self._step()
        except BaseException as error:  # a bug or a broken runner: no reader may wait forever
            self._failure = f"the engine stopped: {error!r:.500}. Load the model again."
            failure = EngineGoneError(self._failure)
            failure.__cause__ = error
            logger.exception("the engine stopped")
        self._shut_down(failure)

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_work and not self._is_stuck

    def _take_messages(self) -> bool:
        """Empty the inbox, waiting for a message when idle. False: close."""
        # An abort queues its message before it interrupts, so an interrupt cleared here has its
        # message in the inbox.
        with self._step_lock:
            self._in_step = frozenset()
            self._runner.clear_interrupt()
        aborted: list[str] = []
        refused: list[Request] = []
        ended: list[Request] = []  # and those of which an image could not be encoded
        is_closing = False
        is_idle = not self._has_work
        begin_at = 0.0  # how long the first request of an idle engine waits for others
        while True:
            try:
                if not (self._has_work or aborted or refused or ended):
                    message = self._inbox.get()
                elif aborted or refused or ended or len(self._scheduler.waiting) >= self._most:
                    message = self._inbox.get_nowait()
                else:
                    left = begin_at - time.monotonic() if begin_at else 0.0
                    message = self._inbox.get(left > 0, max(left, 0.0))
            except queue.Empty:
                break
            self._is_stuck = False
            if message is None:
                is_closing = True
                break
            if isinstance(message, str):
                aborted.append(message)
            elif isinstance(message, Encoded):
                ended += self._scheduler.take(message)
                if not self._scheduler.encodings.is_busy:  # its cores are ours again
                    self._governor.free()
                self._stats.refresh()
            elif isinstance(message, MakeWay):
                refused += (
                    self._scheduler.displace(message.caller)
                    if self._admission.owes(message.caller)
                    else []
                )
            elif message.finish_reason is not None:  # resumed after its last token
                self._stats.requests += 1
                self._admission.leave(message.caller)
                ended.append(message)
            else:
                self._stats.requests += 1
                self._scheduler.add(message)
                if is_idle and self._batch_wait_s and not begin_at:
                    begin_at = time.monotonic() + self._batch_wait_s
        if ended:
            self._publish(ended)
        if refused:
            self._publish(
                refused,
                QueueFullError(
                    "the queue is full, and this caller has the most requests in it; "
                    "try again later"
                ),
            )
        if aborted:
            with self._step_lock:
                self._aborted.difference_update(aborted)
            self._publish(self._scheduler.abort(aborted))
            self._stats.refresh()
        return not is_closing

    def _step(self) -> None:
        start = time.perf_counter()
        batch = self._scheduler.schedule()
        running = {r.slot: r.request_id for r in self._scheduler.running}
        if not batch.chunks and not batch.ops and running:
            # All of them wait: for encodings, or for their grammars.
            self._is_stuck = self._scheduler.num_encoding == len(running)
            self._stats.refresh()  # others may have come
            if not self._is_stuck:
                time.sleep(HELD_S)
            return
        in_step = frozenset(running[c.slot] for c in batch.chunks)
        with self._step_lock:
            self._in_step = in_step
            if self._in_step and self._in_step <= self._aborted:
                self._runner.interrupt()
        drafting = 0.0 if self._drafter is None else self._drafter.seconds - self._drafted_s
        self._drafted_s += drafting
        with self._turns:
            began = time.perf_counter()
            output = self._runner.execute(batch)
            seconds = time.perf_counter() - began
        if not (output.interrupted or output.error or output.no_room):
            self._observe(batch, seconds)
            self._governor.observe(batch.num_tokens, seconds)
        self._journal.add(began, seconds, batch, output.resident, running)
        stats = self._stats
        stats.generation_tokens += sum(map(len, output.tokens))
        stats.steps += 1
        stats.busy_slots += len(batch.chunks)
        stats.backend_s += output.backend_s + drafting
        error = output.error or ("the context has no room left" if output.no_room else None)
        self._publish(
            self._scheduler.update(batch, output),
            EngineError(f"this request failed in the backend: {error}") if error else None,
        )
        stats.step_s += time.perf_counter() - start
        stats.refresh()

    def _observe(self, batch: Batch, seconds: float) -> None:
        decoding = [c for c in batch.chunks if c.sample and len(c.tokens) == 1 + c.draft]
        num_decode = sum(len(c.tokens) for c in decoding)
        self._clock.observe(
            num_streams=len(decoding),
            num_decode=num_decode,
            num_prefill=batch.num_tokens - num_decode,
            seconds=seconds,
        )

    def _publish(self, requests: list[Request], failure: Exception | None = None) -> None:
        """Hand a step's news to the readers: first it is counted, then all of it stored, before any
        reader is woken."""
        for request in requests:
            if request.finish_reason is not None:
                self._stats.prompt_tokens += request.num_prompt_tokens
                self._stats.cached_tokens += request.num_cached_tokens
                self._stats.media += len(request.media)
        self._stats.refresh()
        for request in requests:
            reason = failure
            if request.error:
                reason = (
                    InvalidRequestError(request.error)
                    if request.is_refused
                    else EngineError(f"this request failed in the backend: {request.error}")
                )
            request.publish(
                reason
                if request.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
                else None
            )
        for request in requests:
            request.channel.wake()

    def _shut_down(self, failure: Exception) -> None:
        with self._lock:
            self._closed = True
        pending = [*self._scheduler.running, *self._scheduler.waiting]
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, Request):
                pending.append(message)
        for request in pending:
            if request.finish_reason is None:
                request.finish(
                    FinishReason.ABORT
                    if isinstance(failure, ModelUnloadedError)
                    else FinishReason.ERROR
                )
        self._publish(pending, failure)
        if self._runner.saves and isinstance(failure, ModelUnloadedError):
            end = time.monotonic() + FAREWELL_S
            # Best effort: a full or slow disk must not delay freeing the memory.
            with contextlib.suppress(Exception):
                for op in self._scheduler.farewell():
                    if time.monotonic() < end:
                        self._runner.execute(Batch((), (op,)))
        self._scheduler.running.clear()
        self._scheduler.waiting.clear()
        self._stats.refresh()
