"""One model of a `ModelManager`: what it is, and where it is in its life. Not thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmkit.errors import EngineGoneError, LLMKitError, ModelBusyError, ModelLoadError
from llmkit.workers.budget import Need
from llmkit.workers.crew import Crew
from llmkit.workers.files import files_of
from llmkit.workers.resident import Resident, resident, total

__all__ = ["ModelStatus", "Phase", "Place", "ServedModel"]

Phase = Literal["unloaded", "loading", "ready", "restarting", "draining", "stopping", "failed"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server offers.

    ``task`` makes the task of its worker (`llmkit.workers.engine`), and may take long: a file may
    have to be downloaded. ``need`` estimates the memory of a task. ``keep_s``: unload after so
    many idle seconds; None leaves it to the server. ``pinned``: never unload it to make room.
    ``need`` is of all ``replicas`` together, the workers that it gets. ``is_there`` says whether
    its files still are; it is asked while the model is not loaded.
    """

    name: str
    task: Callable[[], dict[str, Any]]
    need: Callable[[dict[str, Any]], Need] = lambda _: Need(0)
    aliases: tuple[str, ...] = ()
    lazy: bool = False
    pinned: bool = False
    force: bool = False
    keep_s: float | None = None
    replicas: int = 1
    is_there: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What is known of a model: sizes in bytes, times in seconds; ``loaded`` is a share."""

    name: str
    phase: Phase
    reason: str = ""
    loaded: float = 0.0
    is_default: bool = False
    pinned: bool = False
    aliases: tuple[str, ...] = ()
    num_used: int = 0
    idle_s: float | None = None
    expires_s: float | None = None
    ram_bytes: int = 0
    gpu_bytes: int = 0
    pid: int | None = None
    restarts: int = 0
    loads: int = 0
    load_s: float = 0.0
    replicas: int = 1
    replicas_ready: int = 0
    pids: tuple[int, ...] = ()


class _Preparation:
    """Makes a model's task, and estimates its memory, on a thread of its own."""

    def __init__(self, model: ServedModel, on_end: Callable[[], None]) -> None:
        self._model, self._on_end = model, on_end
        self.task: dict[str, Any] | None = None
        self.need: Need | None = None
        self.files: frozenset[Path] = frozenset()
        self.fault: Exception | None = None
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, name="llmkit-prepare", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            task = self._model.task()
            self.task, self.need = task, self._model.need(task)
            self.files = files_of(task)
        except Exception as error:
            self.fault = error
        self.ended_at = time.monotonic()
        self._on_end()

    @property
    def has_ended(self) -> bool:
        return self.ended_at > 0


@dataclass(slots=True, eq=False)
class Place:
    """``waiters`` want the model; ``again``: load it once it is unloaded.

    ``wake`` is called, on any thread, when there is something to observe.
    """

    model: ServedModel
    wake: Callable[[], None]
    phase: Phase = "unloaded"
    reason: str = ""
    failure: Exception | None = None
    failed_at: float = 0.0
    waiters: list[Future[None]] = field(default_factory=list)
    wanted_at: float = 0.0
    evicts: bool = True  # whether others make way for it
    num_used: int = 0
    num_old: int = 0  # of requests from before the model is unloaded
    last_used: float = field(default_factory=time.monotonic)
    keep_s: float | None = None
    has_keep: bool = False
    worker: Crew | None = None
    drain_until: float = 0.0
    again: bool = False
    loads: int = 0
    load_s: float = 0.0
    restarts: int = 0
    _started: float = 0.0
    _unloading: list[Future[None]] = field(default_factory=list)
    _epoch: int = 0
    _prepared: _Preparation | None = None
    _thread: threading.Thread | None = None
    _has_ended: bool = False

    @property
    def holds(self) -> bool:
        """Whether it takes memory."""
        return self.worker is not None

    @property
    def files(self) -> frozenset[Path]:
        """The files that it has loaded, or is about to load; none while they may be downloaded."""
        is_held = self.phase not in ("unloaded", "failed") or self.is_wanted
        return self._prepared.files if is_held and self._prepared is not None else frozenset()

    @property
    def is_offered(self) -> bool:
        """Whether callers may ask for it: not once its files were deleted."""
        return self.phase not in ("unloaded", "failed") or self.model.is_there()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it to be loaded."""
        if self.phase not in ("unloaded", "failed"):
            return False
        self.waiters = [f for f in self.waiters if not f.cancelled()]
        return bool(self.waiters)

    def want(self, future: Future[None], *, evicts: bool = True) -> None:
        """Have it loaded."""
        if not self.waiters:
            self.wanted_at = time.monotonic()
        self.evicts = evicts
        self.waiters.append(future)

    def enter(self) -> int:
        """A request begins; returns what ``leave`` needs."""
        self.num_used += 1
        self.last_used = time.monotonic()
        return self._epoch

    def leave(self, entered: int) -> None:
        """A request has ended."""
        if entered == self._epoch:
            self.num_used = max(0, self.num_used - 1)
        else:
            self.num_old = max(0, self.num_old - 1)
        self.last_used = time.monotonic()

    def keep(self, general: float | None) -> float | None:
        """Idle seconds after which it is unloaded; None is never."""
        if self.model.pinned:
            return None
        if self.has_keep:
            return self.keep_s
        return general if self.model.keep_s is None else self.model.keep_s

    def need(self) -> Need | None:
        """The estimate; None while the file is being fetched. Raises what that raised."""
        if self._prepared is None:
            self.phase, self.reason = "loading", f"{self.model.name!r} is being prepared"
            self._prepared = _Preparation(self.model, self.wake)
        if not self._prepared.has_ended:
            return None
        if self._prepared.fault is not None:
            fault, self._prepared = self._prepared.fault, None
            raise fault
        if self.phase == "loading":
            self.phase, self.reason = "unloaded", ""
            self.wanted_at = max(self.wanted_at, self._prepared.ended_at)
        return self._prepared.need

    def holding(self) -> Need:
        """What it takes, measured where it can be."""
        return self._holding(self._measured())

    def _holding(self, measured: Resident) -> Need:
        need = self._estimated
        ram = max(need.ram_bytes, measured.all_bytes)
        return Need(ram, need.gpu_bytes, measured.used_bytes)

    @property
    def _estimated(self) -> Need:
        prepared = self._prepared
        return Need(0) if prepared is None or prepared.need is None else prepared.need

    def _measured(self) -> Resident:
        """What its processes have taken."""
        pids = () if self.worker is None else self.worker.pids
        found = total(resident(pid, with_children=self._estimated.in_child) for pid in pids)
        # Replicas map the same files, which are in memory once.
        mapped = found.all_bytes - found.used_bytes
        again = mapped - mapped // max(1, len(pids))
        return Resident(found.all_bytes, found.used_bytes + again)

    def start(self) -> None:
        """Start its worker."""
        assert self._prepared is not None and self._prepared.task is not None
        self.failure, self.reason, self.again = None, "", False
        self.phase, self._started = "loading", time.monotonic()
        self.worker = Crew(self._prepared.task, self.model.replicas, on_ready=self.wake)

    def observe(self) -> None:
        """Follow the worker's state, or that of the preparation."""
        if self.phase == "loading" and self.worker is None:
            if self._prepared is None or self._prepared.has_ended:
                self.phase = "unloaded"  # prepared; it begins next
                self.wanted_at = time.monotonic()
            return
        if self.phase == "stopping":
            if self._has_ended:
                self._stopped()
            return
        if self.worker is None:
            return
        state = self.worker.state
        self.restarts = self.worker.restarts
        if state.is_gone:
            self.fail(self.worker.failure or EngineGoneError(state.reason or "it has ended"))
        elif state.phase == "ready" and self.phase in ("loading", "restarting"):
            if self.phase == "loading":
                self.loads += 1
                self.load_s = time.monotonic() - self._started
            self.phase, self.reason, self.last_used = "ready", "", time.monotonic()
            self._answer(self.waiters)
        elif state.phase == "loading" and self.phase == "ready":
            self.phase, self.reason = "restarting", state.reason or ""

    def drain(self, future: Future[None] | None, seconds: float, again: bool) -> None:
        """Unload it once it is idle, or after ``seconds``; at once if it still loads.

        ``again``: have it loaded then, also if nobody waits for that any more.
        """
        is_loading = self.phase == "loading"
        if again:
            self.want(future or Future())
            self.want(Future())  # which nobody cancels
        elif future is not None:
            self._unloading.append(future)
        if self.phase in ("unloaded", "failed"):
            self.phase, self.reason, self.failure = "unloaded", "", None
            self._answer(self._unloading)
        if not again and self.phase in ("unloaded", "loading"):
            self.refuse_waiters()
        if self.phase == "unloaded":
            return
        self.again = self.again or again
        if self.phase not in ("draining", "stopping"):
            self._epoch += 1
            self.num_old, self.num_used = self.num_old + self.num_used, 0
        if self.phase != "stopping":
            # Requests that wait for a load wait for the next one: it must not wait for them.
            until = time.monotonic() + (0.0 if is_loading else seconds)
            is_draining = self.phase == "draining"
            self.drain_until = min(until, self.drain_until) if is_draining else until
            self.phase, self.reason = "draining", f"{self.model.name!r} is being unloaded"

    def stop(self) -> None:
        """End its worker, on a thread: that takes a while."""
        if self.phase == "stopping" or self.worker is None:
            if self.worker is None and self.phase == "draining":
                self._stopped()
            return
        worker = self.worker

        def end() -> None:
            worker.close()
            self._has_ended = True
            self.wake()

        self._has_ended = False
        thread = threading.Thread(target=end, name="llmkit-unload", daemon=True)
        thread.start()
        self.phase, self._thread = "stopping", thread

    def join(self) -> None:
        if self.phase == "stopping" and self._thread is not None:
            self._thread.join()

    def _stopped(self) -> None:
        self.worker = self._thread = self._prepared = None
        self.phase, self.reason, self.has_keep, self.keep_s = "unloaded", "", False, None
        self._answer(self._unloading)
        if self.again:
            self.wanted_at = time.monotonic()

    def fail(self, error: Exception) -> None:
        """It could not be loaded, or has crashed for good."""
        if not isinstance(error, LLMKitError):  # of the system, with a path say
            error = ModelLoadError(str(error))
        self.phase, self.reason = "failed", str(error)
        self.failure, self.failed_at = error, time.monotonic()
        self._prepared = None
        if self.worker is not None:
            worker, self.worker = self.worker, None
            threading.Thread(target=worker.close, daemon=True).start()
        self.refuse_waiters(error)
        for future in self._unloading:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._unloading = []

    def refuse(self, error: Exception) -> None:
        """It cannot be loaded now, but perhaps later."""
        self.phase, self.reason, self._prepared = "unloaded", "", None
        self.refuse_waiters(error)

    def refuse_waiters(self, error: Exception | None = None) -> None:
        """Whoever waits for it waits no longer; by default because it is unloaded."""
        error = error or ModelBusyError(f"the model {self.model.name!r} is being unloaded.")
        waiters, self.waiters = self.waiters, []
        for future in waiters:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _answer(self, futures: list[Future[None]]) -> None:
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
        futures.clear()

    def status(self, is_default: bool, idle_unload_s: float | None = None) -> ModelStatus:
        now = time.monotonic()
        measured = self._measured()
        holding = self._holding(measured) if self.holds else Need(0)
        keep = self.keep(idle_unload_s)
        idle = now - self.last_used if self.phase == "ready" and not self.num_used else None
        state = None if self.worker is None else self.worker.state
        pids = () if self.worker is None else self.worker.pids
        is_next = self.phase == "unloaded" and bool(self.waiters)
        return ModelStatus(
            name=self.model.name,
            phase="loading" if is_next else self.phase,
            reason=self.reason,
            loaded=1.0
            if self.phase == "ready"
            else (state.share or 0.0 if state is not None else 0.0),
            is_default=is_default,
            pinned=self.model.pinned,
            aliases=self.model.aliases,
            num_used=self.num_used + self.num_old,
            idle_s=idle,
            expires_s=None if keep is None or idle is None else max(0.0, keep - idle),
            ram_bytes=measured.all_bytes or holding.ram_bytes,
            gpu_bytes=holding.gpu_bytes,
            pid=next(iter(pids), None),
            restarts=self.restarts,
            loads=self.loads,
            load_s=self.load_s,
            replicas=self.model.replicas,
            replicas_ready=0 if self.worker is None else self.worker.num_ready,
            pids=pids,
        )
