"""`ModelManager`: several models, each in a supervised worker, within a memory budget.

A model is loaded when it is first asked for, or at the start. When there is no room, the least
recently used model that is idle and not pinned makes way. Any thread; one thread of its own does
all the work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

from llmkit.errors import (
    EngineGoneError,
    InsufficientMemoryError,
    ModelBusyError,
    ModelNotFoundError,
)
from llmkit.workers.budget import Budget, Need
from llmkit.workers.place import ModelStatus, Phase, Place, ServedModel

__all__ = ["ModelManager"]

TICK_S = 0.25
WAIT_FOR_ROOM_S = 60.0  # for models in use to become idle
RETRY_S = 10.0  # before a model that failed to load is tried again
MAX_ALIASES = 4096  # with those that models were found by


class ModelManager:
    """The models that one server offers.

    ``find`` names a model that is not in ``models``, one on disk say; None if there is none.
    ``is_busy`` says whether an engine has requests that did not come through ``enter``.
    ``on_change`` is called after each change, on the manager's thread. With ``start`` False nothing
    is loaded before `start`.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        budget: Budget | None = None,
        idle_unload_s: float | None = None,
        drain_s: float = 30.0,
        find: Callable[[str], ServedModel | None] | None = None,
        is_busy: Callable[[str], bool] = lambda _: False,
        on_change: Callable[[ModelStatus], None] = lambda _: None,
        start: bool = True,
    ) -> None:
        self._lock = threading.RLock()
        self._places: dict[str, Place] = {}
        self._aliases: dict[str, str] = {}
        self._budget = budget or Budget()
        self._idle_unload_s, self._drain_s = idle_unload_s, drain_s
        self._find, self._busy, self._on_change = find, is_busy, on_change
        self._wake, self._closing = threading.Event(), False
        self._seen: dict[str, tuple[str, int]] = {}
        for model in models:
            self.add(model)
        self._default = self._first = models[0].name if models else None
        for model in models:
            if not model.lazy:
                self._places[model.name].want(Future(), evicts=False)
        self._thread = threading.Thread(target=self._run, name="llmkit-models", daemon=True)
        if start:
            self.start()

    def start(self) -> None:
        """Begin to load what is to be loaded at the start."""
        self._wake.set()
        self._thread.start()

    @property
    def default(self) -> str | None:
        """The model behind the name "default"."""
        return self._default

    def set_default(self, model: str | None) -> None:
        """None is the first of the start. Raises `ModelNotFoundError`."""
        self._default = self._first if model is None else self._place(model).model.name

    def names(self) -> list[str]:
        """The names of all models."""
        with self._lock:
            return [name for name, place in self._places.items() if place.is_offered]

    def statuses(self) -> list[ModelStatus]:
        """All models, loaded or not."""
        with self._lock:
            return [self._status(place) for place in self._places.values() if place.is_offered]

    def status(self, model: str) -> ModelStatus:
        """Raises `ModelNotFoundError`."""
        with self._lock:
            return self._status(self._place(model))

    def known(self, model: str) -> str | None:
        """The name of a model, given that, an alias or "default"; None if it is not known yet."""
        with self._lock:
            name = self._default if model == "default" else self._aliases.get(model, model)
            place = self._places.get(name or "")
            return name if place is not None and place.is_offered else None

    def phase(self, model: str) -> Phase:
        """Where a model is in its life. Raises `ModelNotFoundError`."""
        with self._lock:
            return self._place(model).phase

    def name_of(self, model: str) -> str | None:
        """As ``known``, and looks for other models with ``find``, which may take a while."""
        name = self.known(model)
        if name is not None or model == "default" or self._find is None:
            return name
        found = self._find(model)
        if found is None or found.name == "default":
            return None
        with self._lock:
            if (old := self._places.get(found.name)) is not None and not old.is_offered:
                del self._places[found.name]  # its files were deleted: these are others
            if found.name not in self._places and found.name not in self._aliases:
                self.add(found)
            name = self.known(found.name)
            if name is not None and name != model and len(self._aliases) < MAX_ALIASES:
                self._aliases[model] = name
            return name

    def pids(self, *, replicated: bool | None = None) -> frozenset[int]:
        """Process ids of the workers; or of those that are replicas, or are none."""
        with self._lock:
            return frozenset(
                pid
                for place in self._places.values()
                if place.worker is not None and replicated in (None, place.model.replicas > 1)
                for pid in place.worker.pids
            )

    def add(self, model: ServedModel) -> None:
        """Offer another model. Raises `ModelBusyError` if the name is taken."""
        with self._lock:
            for name in (model.name, *model.aliases):
                if name in self._places or name in self._aliases or name == "default":
                    raise ModelBusyError(f"there is a model {name!r} already.")
            self._places[model.name] = Place(model, self._wake.set)
            self._aliases.update(dict.fromkeys(model.aliases, model.name))

    def enter(self, model: str) -> int:
        """A request begins; while it runs the model is not unloaded. Returns what ``leave`` needs.

        One that comes while the model is being unloaded is no reason to wait with that: it has the
        model loaded again. Raises `ModelNotFoundError`.
        """
        with self._lock:
            return self._place(model).enter()

    def leave(self, model: str, entered: int) -> None:
        """A request has ended."""
        with self._lock:
            place = self._places.get(model)
            if place is not None:
                place.leave(entered)
                if place.phase == "draining" or place.keep_s == 0:
                    self._wake.set()

    def keep(self, model: str, seconds: float | None) -> None:
        """Unload a model after so many idle seconds: 0 at once, None never."""
        with self._lock:
            place = self._place(model)
            place.keep_s, place.has_keep = seconds, True
        self._wake.set()

    def load(self, model: str) -> Future[None]:
        """Have a model loaded. The future ends when it is ready.

        It holds `InsufficientMemoryError`, `ModelBusyError` (no room while others are in use), or
        what a load raises.
        """
        with self._lock:
            place = self._place(model)
            future: Future[None] = Future()
            if self._closing:
                future.set_exception(EngineGoneError("the server is shutting down"))
                return future
            if place.phase == "ready":
                future.set_result(None)
                return future
            if place.phase == "failed" and time.monotonic() - place.failed_at < RETRY_S:
                future.set_exception(place.failure or EngineGoneError(place.reason))
                return future
            place.want(future)
        self._wake.set()
        return future

    def unload(
        self, model: str, *, drain: bool = True, force: bool = False, again: bool = False
    ) -> Future[None]:
        """Unload a model once its requests have ended; ``force`` does not wait for them.

        Without ``drain``, raises `ModelBusyError` if there are any. ``again``: load it afterwards.
        """
        with self._lock:
            place = self._place(model)
            future: Future[None] = Future()
            if self._closing:
                future.set_exception(EngineGoneError("the server is shutting down"))
                return future
            is_up = place.phase not in ("unloaded", "failed")
            if is_up and not (drain or force) and self._in_use(place):
                raise ModelBusyError(
                    f"{place.model.name!r} is answering requests; wait (drain) or end them (force)."
                )
            place.drain(future, self._drain_s if not force else 0.0, again)
        self._wake.set()
        return future

    def in_use(self, model: str) -> bool:
        """Whether requests run or wait. Raises `ModelNotFoundError`."""
        with self._lock:
            return self._in_use(self._place(model))

    def files(self) -> frozenset[Path]:
        """The files of the models that are loaded or being loaded, links resolved."""
        with self._lock:
            return frozenset(file for place in self._places.values() for file in place.files)

    def need_of(self, model: str) -> Need:
        """What loading a model would take. May take a while; raises what estimating it raises."""
        place = self._place(model)
        return place.model.need(place.model.task())

    def fits(self, model: str) -> bool:
        """Whether a model could be loaded now without another making way; see ``need_of``."""
        place = self._place(model)
        if place.holds:
            return True
        need = self.need_of(model)
        with self._lock:
            held = [p.holding() for p in self._places.values() if p.holds]
        return place.model.force or not self._budget.lacking(need, held)

    def check(self) -> None:
        """Raises the reason if all models have failed and none could be loaded by a request."""
        with self._lock:
            places = list(self._places.values())
        is_open = self._find is not None or any(p.model.lazy for p in places)
        if places and not is_open and all(place.phase == "failed" for place in places):
            raise places[0].failure or EngineGoneError(places[0].reason)

    def close(self) -> None:
        """Unload all models."""
        self._closing = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def kill(self) -> None:
        """End all workers at once, also while ``close`` waits for them."""
        self._closing = True
        for place in list(self._places.values()):
            worker = place.worker
            if worker is not None:
                worker.kill()
        self._wake.set()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(TICK_S)
            self._wake.clear()
            self._look()
        with self._lock:
            places = list(self._places.values())
            for place in places:
                place.stop()
        for place in places:
            place.join()
        with self._lock:
            for place in places:
                place.fail(EngineGoneError("the server is shutting down"))

    def _look(self) -> None:
        with self._lock:
            places = list(self._places.values())
            for place in places:
                self._guarded(self._advance, place)
            # Whoever waited longest first; what it needs is kept for it.
            reserved: list[Need] = []
            for place in sorted(places, key=lambda p: p.wanted_at):
                if place.is_wanted:
                    self._guarded(self._begin, place, reserved)
        for place in places:
            self._tell(place)

    @staticmethod
    def _guarded(action: Callable[..., None], place: Place, *more: list[Need]) -> None:
        """A fault with one model is that model's alone."""
        try:
            action(place, *more)
        except Exception as error:
            place.fail(EngineGoneError(f"the model manager failed: {error!r:.300}"))

    def _advance(self, place: Place) -> None:
        place.observe()
        now = time.monotonic()
        if place.phase == "ready":
            keep = place.keep(self._idle_unload_s)
            is_old = keep is not None and now - place.last_used >= keep
            if is_old and not self._in_use(place):
                place.drain(None, 0.0, False)
        if place.phase == "draining":
            # Those that came since wait for the drain, so it does not wait for them.
            is_used = place.num_old > 0 or self._is_busy(place)
            if not is_used or now >= place.drain_until:
                place.stop()

    def _begin(self, place: Place, reserved: list[Need]) -> None:
        """Load a model that is wanted, once there is room beside what is ``reserved``."""
        now = time.monotonic()
        try:
            need = place.need()
        except Exception as error:
            place.fail(error)
            return
        if need is None:
            return  # its file is being fetched
        others = [p for p in self._places.values() if p is not place]
        held = [*reserved, *(p.holding() for p in others if p.holds)]
        lacking = self._budget.lacking(need, held)
        if place.model.force or not lacking:
            place.start()
            return
        if self._budget.never(need):
            place.fail(InsufficientMemoryError(f"{place.model.name!r}: {self._budget.never(need)}"))
            return
        users = ", ".join(repr(p.model.name) for p in others if p.holds)
        if not place.evicts and users:
            place.fail(
                InsufficientMemoryError(
                    f"there is no room for {place.model.name!r} beside {users} ({lacking}); make "
                    "it lazy, or raise memory_budget_gb."
                )
            )
            return
        reserved.append(need)
        if any(p.phase in ("draining", "stopping") for p in others):
            return  # room is being made
        victim = self._victim(others)
        if victim is not None:
            victim.drain(None, 0.0, False)
            victim.stop()
        elif not users and len(reserved) == 1:
            place.start()  # nobody can make way; the worker says whether it fits
        elif now - place.wanted_at > WAIT_FOR_ROOM_S:
            place.refuse(
                ModelBusyError(
                    f"there is no room for {place.model.name!r} ({lacking}): {users} must stay, "
                    "in use or pinned; try again later."
                )
            )

    def _victim(self, places: Iterable[Place]) -> Place | None:
        """The least recently used model that is ready, idle and not pinned."""
        idle = [
            p
            for p in places
            if p.phase == "ready" and not p.model.pinned and not self._in_use(p) and not p.waiters
        ]
        return min(idle, key=lambda p: p.last_used, default=None)

    def _in_use(self, place: Place) -> bool:
        return place.num_used + place.num_old > 0 or self._is_busy(place)

    def _is_busy(self, place: Place) -> bool:
        try:
            return self._busy(place.model.name)
        except Exception:
            return True  # who knows

    def _status(self, place: Place) -> ModelStatus:
        return place.status(place.model.name == self._default, self._idle_unload_s)

    def _place(self, model: str) -> Place:
        with self._lock:
            name = self.known(model)
            if name is not None:
                return self._places[name]
            names = ", ".join(repr(n) for n in self.names()[:20])
        offered = f"there are: {names}" if names else "none is offered"
        raise ModelNotFoundError(f"there is no model {model!r:.200} here; {offered}.")

    def _tell(self, place: Place) -> None:
        name, seen = place.model.name, (place.phase, place.restarts)
        if self._seen.get(name) != seen:
            self._seen[name] = seen
            with contextlib.suppress(Exception):
                self._on_change(self._status(place))
