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

from llmkit.errors import (
    EngineGoneError,
    InsufficientMemoryError,
    LLMKitError,
    ModelBusyError,
    ModelNotFoundError,
)
from llmkit.workers.budget import Budget
from llmkit.workers.place import ModelStatus, Phase, Place, ServedModel

__all__ = ["ModelManager"]

TICK_S = 0.25
WAIT_FOR_ROOM_S = 60.0  # for models in use to become idle
RETRY_S = 10.0  # before a model that failed to load is tried again


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
        default: str | None = None,
        find: Callable[[str], ServedModel | None] = lambda _: None,
        is_busy: Callable[[str], bool] = lambda _: False,
        on_change: Callable[[ModelStatus], None] = lambda _: None,
        start: bool = True,
    ) -> None:
        self._lock = threading.RLock()
        self._places: dict[str, Place] = {}
        self._aliases: dict[str, str] = {}
        self._budget = budget or Budget()
        self._idle_unload_s, self._drain_s = idle_unload_s, drain_s
        self._find, self._is_busy, self._on_change = find, is_busy, on_change
        self._wake, self._closing = threading.Event(), False
        self._seen: dict[str, tuple[str, int]] = {}
        for model in models:
            self.add(model)
        self._default = default or (models[0].name if models else None)
        for model in models:
            if not model.lazy:
                self._places[model.name].want(Future())
        self._thread = threading.Thread(target=self._run, name="llmkit-models", daemon=True)
        if start:
            self.start()

    # What there is

    def start(self) -> None:
        """Begin to load what is to be loaded at the start."""
        self._thread.start()

    @property
    def default(self) -> str | None:
        """The model behind the name "default"."""
        return self._default

    def set_default(self, model: str) -> None:
        """Raises `ModelNotFoundError`."""
        self._default = self._place(model).model.name

    def statuses(self) -> list[ModelStatus]:
        """All models, loaded or not."""
        with self._lock:
            return [place.status(self._is_default(place)) for place in self._places.values()]

    def status(self, model: str) -> ModelStatus:
        """Raises `ModelNotFoundError`."""
        with self._lock:
            place = self._place(model)
            return place.status(self._is_default(place))

    def known(self, model: str) -> str | None:
        """The name of a model, given that, an alias or "default"; None if it is not known yet."""
        with self._lock:
            name = self._default if model == "default" else self._aliases.get(model, model)
            return name if name in self._places else None

    def phase(self, model: str) -> Phase:
        """Where a model is in its life. Raises `ModelNotFoundError`."""
        with self._lock:
            return self._place(model).phase

    def name_of(self, model: str) -> str | None:
        """As ``known``, and looks for other models with ``find``, which may take a while."""
        name = self.known(model)
        if name is not None or model == "default":
            return name
        found = self._find(model)
        if found is None:
            return None
        with self._lock:
            if found.name not in self._places:
                self.add(found)
        return found.name

    def pids(self) -> frozenset[int]:
        """Process ids of the workers."""
        with self._lock:
            return frozenset(
                place.worker.pid
                for place in self._places.values()
                if place.worker is not None and place.worker.pid is not None
            )

    def add(self, model: ServedModel) -> None:
        """Offer another model. Raises `ModelBusyError` if the name is taken."""
        with self._lock:
            for name in (model.name, *model.aliases):
                if name in self._places or name in self._aliases or name == "default":
                    raise ModelBusyError(f"there is a model {name!r} already.")
            self._places[model.name] = Place(model)
            self._aliases.update(dict.fromkeys(model.aliases, model.name))

    def remove(self, model: str) -> None:
        """Offer a model no longer. Raises `ModelBusyError` while it is loaded."""
        with self._lock:
            place = self._place(model)
            if place.phase not in ("unloaded", "failed"):
                raise ModelBusyError(f"{place.model.name!r} is loaded; unload it first.")
            del self._places[place.model.name]
            self._aliases = {a: n for a, n in self._aliases.items() if n != place.model.name}

    # Use

    def enter(self, model: str) -> None:
        """A request begins; while it runs the model is not unloaded. Raises
        `ModelNotFoundError`, and `ModelBusyError` while the model is being unloaded for good."""
        with self._lock:
            place = self._place(model)
            if place.phase == "draining" and not place.again:
                raise ModelBusyError(
                    f"the model {place.model.name!r} is being unloaded; try again in a moment."
                )
            place.num_used += 1
            place.last_used = time.monotonic()

    def leave(self, model: str) -> None:
        """A request has ended."""
        with self._lock:
            place = self._places.get(model)
            if place is not None:
                place.num_used = max(0, place.num_used - 1)
                place.last_used = time.monotonic()
                if place.num_used == 0 and (place.phase == "draining" or place.keep_s == 0):
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
            name = place.model.name
            future: Future[None] = Future()
            if place.phase in ("unloaded", "failed"):
                place.forget_failure()
                if again:
                    place.want(future)
                else:
                    future.set_result(None)
            else:
                if not (drain or force) and self._in_use(place):
                    raise ModelBusyError(
                        f"{name!r} has {place.num_used or 'other'} requests; wait for them "
                        "(drain), or end them (force)."
                    )
                place.drain(future, self._drain_s if not force else 0.0, again)
        self._wake.set()
        return future

    def in_use(self, model: str) -> bool:
        """Whether requests run or wait. Raises `ModelNotFoundError`."""
        with self._lock:
            return self._in_use(self._place(model))

    def fits(self, model: str) -> bool:
        """Whether a model could be loaded now without another making way. May take a while.

        Raises what estimating it raises.
        """
        place = self._place(model)
        if place.holds:
            return True
        need = place.model.need(place.model.task())
        with self._lock:
            held = [p.holding() for p in self._places.values() if p.holds]
        return not self._budget.lacking(need, held)

    def check(self) -> None:
        """Raises the reason if every model has failed."""
        statuses = self.statuses()
        if statuses and all(status.phase == "failed" for status in statuses):
            failure = self._places[statuses[0].name].failure
            raise failure or EngineGoneError(statuses[0].reason)

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

    # The manager's thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self._look()
            except Exception as error:  # a fault here must not end all models
                self._fail_waiting(error)
        with self._lock:
            places = list(self._places.values())
        for place in places:
            place.stop()
        for place in places:
            place.join()
            place.fail(EngineGoneError("the server is shutting down"))

    def _look(self) -> None:
        with self._lock:
            places = list(self._places.values())
        for place in places:
            with self._lock:
                self._advance(place)
            self._tell(place)

    def _advance(self, place: Place) -> None:
        place.observe()
        now = time.monotonic()
        if place.phase == "ready":
            keep = place.keep_s if place.has_keep else place.model.keep_s
            if keep is None and not place.has_keep:
                keep = self._idle_unload_s
            is_old = keep is not None and now - place.last_used >= keep
            if is_old and not place.model.pinned and not self._in_use(place):
                place.drain(None, 0.0, False)
        if place.phase == "draining" and (not self._in_use(place) or now >= place.drain_until):
            place.stop()
        if place.phase in ("unloaded", "failed") and place.waiters:
            self._begin(place, now)

    def _begin(self, place: Place, now: float) -> None:
        """Load a model that is wanted, once there is room."""
        try:
            need = place.need()
        except Exception as error:
            place.fail(error if isinstance(error, LLMKitError) else EngineGoneError(str(error)))
            return
        if need is None:
            return  # its file is being fetched
        others = [p for p in self._places.values() if p is not place]
        lacking = self._budget.lacking(need, [p.holding() for p in others if p.holds])
        if place.model.force or not lacking:
            place.start()
            return
        if self._budget.never(need):
            place.fail(InsufficientMemoryError(f"{place.model.name!r}: {self._budget.never(need)}"))
            return
        if any(p.phase in ("draining", "stopping") for p in others):
            return  # room is being made
        victim = self._victim(others)
        if victim is not None:
            victim.drain(None, 0.0, False)
            victim.stop()
        elif not any(p.holds for p in others):
            place.start()  # nobody can make way; the worker says whether it fits
        elif now - place.wanted_at > WAIT_FOR_ROOM_S:
            users = ", ".join(repr(p.model.name) for p in others if p.holds)
            place.fail(
                ModelBusyError(
                    f"there is no room for {place.model.name!r} ({lacking}) while {users} "
                    "is in use or pinned; try again later."
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
        return place.num_used > 0 or self._is_busy(place.model.name)

    def _is_default(self, place: Place) -> bool:
        return place.model.name == self._default

    def _place(self, model: str) -> Place:
        name = self.name_of(model)
        if name is None or name not in self._places:
            names = ", ".join(repr(n) for n in list(self._places)[:20]) or "none"
            raise ModelNotFoundError(f"there is no model {model!r:.200} here; there are: {names}.")
        return self._places[name]

    def _tell(self, place: Place) -> None:
        name, seen = place.model.name, (place.phase, place.restarts)
        if self._seen.get(name) != seen:
            self._seen[name] = seen
            with contextlib.suppress(Exception):
                self._on_change(place.status(self._is_default(place)))

    def _fail_waiting(self, error: Exception) -> None:
        with self._lock:
            for place in self._places.values():
                if place.waiters:
                    place.fail(EngineGoneError(f"the model manager failed: {error!r:.300}"))
