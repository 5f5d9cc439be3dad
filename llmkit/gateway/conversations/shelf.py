"""The stores of conversations and responses, off the loop: opened when first used.

Tornado loop only; the stores' calls run on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmkit.errors import StoreError
from llmkit.gateway.conversations.uses import Uses
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.settings.gateway import GatewayOptions
    from llmkit.store.conversations import ConversationStore
    from llmkit.store.database import Database
    from llmkit.store.responses import ResponseStore

__all__ = ["Shelf", "Stores"]

logger = logging.getLogger("llmkit.gateway")

NUM_THREADS, NUM_LOOKING = 4, 2
PER_OWNER = 2  # threads: one key may stand for many people
RENEW_S, TIDY_S = 15.0, 60.0
POSTPONED_CHARS = 64 << 20  # of answers that wait for a database in trouble
LEAST_CHARS = 16 << 10  # that one counts for, so that the shortest are not too many
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores in one database. Any thread."""

    conversations: ConversationStore
    responses: ResponseStore

    def renew(self) -> None:
        self.conversations.renew()
        self.responses.renew()

    def recover(self) -> None:
        self.conversations.recover()
        self.responses.recover()

    def tidy(self) -> None:
        self.renew()
        self.recover()
        self.conversations.remove_expired()
        self.responses.remove_expired()


@dataclass(frozen=True, slots=True)
class Postponed:
    """What a database in trouble did not take: ``size`` is its characters, about."""

    run: Callable[[Stores], object]
    give_up: Callable[[Stores], None]
    size: int


class Shelf:
    """Calls of the stores in a database, which ``database`` opens; it is closed with this.

    ``max_sessions`` of each owner are kept, for ``ttl_s`` after their last use (None: ever), and
    those in ``uses`` in any case. While it is in use, leases are renewed, and what others left or
    what has expired is tidied up, on a thread of its own.
    """

    def __init__(
        self,
        database: Callable[[], Database],
        *,
        max_sessions: int = 1000,
        ttl_s: float | None = None,
    ) -> None:
        self._database, self._max_sessions, self._ttl_s = database, max_sessions, ttl_s
        self._lock = threading.Lock()
        self._opened: Database | None = None
        self._stores: Stores | None = None
        self.uses = Uses()
        self._lanes = Lanes(NUM_THREADS, "llmkit-sessions")
        self._looking = Lanes(NUM_LOOKING, "llmkit-looking")
        self._leasing = Lanes(1, "llmkit-leases")  # callers may keep all others busy
        self._upkeep: asyncio.Task[None] | None = None
        self._postponed: deque[Postponed] = deque()

    @classmethod
    def of(cls, options: GatewayOptions, db_url: str | None = None) -> Shelf | None:
        """As the settings say; None if nothing is to be kept."""
        if not options.sessions:
            return None

        def opened() -> Database:
            from llmkit.store.database import open_database

            return open_database(db_url)

        return cls(opened, max_sessions=options.max_sessions, ttl_s=options.session_ttl_s)

    def call(
        self, owner: str, run: Callable[[ConversationStore], T], session_id: str = ""
    ) -> asyncio.Future[T]:
        """What ``run`` returns. Calls for one session of an owner keep their order, and so do those
        for none; an owner takes two threads at most.

        Cancelling it keeps only a call from running that waits for its turn. Raises what the store
        raises, `StoreError` if it cannot be opened.
        """
        lane = _lane(owner, session_id)
        return self._submit(self._lanes, lane, lambda stores: run(stores.conversations))

    def is_behind(self, owner: str, session_id: str) -> bool:
        """Whether a call would wait for others of its owner."""
        return self._lanes.num_waiting(_lane(owner, session_id)) > 0

    def look(self, owner: str, run: Callable[[ConversationStore], T]) -> asyncio.Future[T]:
        """The same for what only reads, and may read much: no turn waits for it."""
        return self._submit(self._looking, owner, lambda stores: run(stores.conversations))

    def reading(self, owner: str, run: Callable[[ConversationStore], T]) -> Future[T]:
        """The same as ``look``, for a thread of somebody else's. Any thread."""
        return self._looking.submit(owner, lambda: run(self._open().conversations))

    def responses(self, owner: str, run: Callable[[ResponseStore], T]) -> asyncio.Future[T]:
        """The same as ``call`` for responses, those of an owner in order."""
        return self._submit(self._lanes, _lane(owner), lambda stores: run(stores.responses))

    def _submit(self, lanes: Lanes, lane: str, run: Callable[[Stores], T]) -> asyncio.Future[T]:
        if self._upkeep is None:
            self._upkeep = asyncio.ensure_future(self._keep_up())
        return asyncio.wrap_future(lanes.submit(lane, lambda: run(self._open())))

    def _open(self) -> Stores:
        with self._lock:
            if self._stores is None:
                from llmkit.store.conversations import ConversationStore
                from llmkit.store.responses import ResponseStore

                self._opened = opened = self._opened or self._database()
                stores = Stores(
                    ConversationStore(opened, max_sessions=self._max_sessions, ttl_s=self._ttl_s),
                    ResponseStore(opened, ttl_s=self._ttl_s),
                )
                stores.conversations.in_use(self.uses.ids)
                stores.recover()
                self._stores = stores
            return self._stores

    async def finish(
        self, owner: str, run: Callable[[ConversationStore], T], session_id: str = ""
    ) -> tuple[T, bool]:
        """The result, whatever happens to the caller meanwhile; whether it was cancelled."""
        call = self.call(owner, run, session_id)
        cancelled = False
        while not call.done():
            try:
                await asyncio.shield(call)
            except asyncio.CancelledError:
                if call.cancelled():
                    raise
                cancelled = True
            except Exception:
                break
        return call.result(), cancelled

    def postpone(
        self, run: Callable[[Stores], object], give_up: Callable[[Stores], None], size: int
    ) -> None:
        """Repeat a call that the database did not take, with each renewal, until it takes it.

        Beyond `POSTPONED_CHARS` the oldest is lost, and its ``give_up`` is called.
        """
        self._postponed.append(Postponed(run, give_up, max(size, LEAST_CHARS)))
        while sum(each.size for each in self._postponed) > POSTPONED_CHARS:
            oldest = self._postponed.popleft()
            logger.warning("an answer is lost: the database takes none, and too many wait for it")
            if self._stores is not None:
                oldest.give_up(self._stores)

    async def _catch_up(self) -> None:
        """Make the postponed calls. Raises `StoreError` at the first that fails again."""
        while self._postponed:
            first = self._postponed.popleft()
            call = asyncio.ensure_future(self._submit(self._leasing, "", first.run))
            try:
                await asyncio.shield(call)
            except asyncio.CancelledError:
                await asyncio.wait([call])
                if not call.cancelled() and isinstance(call.exception(), StoreError):
                    self._postponed.append(first)  # it is still to be made
                raise
            except StoreError:
                self._postponed.append(first)  # behind the others: it alone may be at fault
                raise
            except Exception as error:
                logger.warning("an answer could not be stored: %s", error)

    async def _keep_up(self) -> None:
        passed = 0.0
        while True:
            await asyncio.sleep(RENEW_S)
            passed += RENEW_S
            tidies, passed = passed >= TIDY_S, passed % TIDY_S
            try:
                await self._submit(self._leasing, "", Stores.tidy if tidies else Stores.renew)
                await self._catch_up()
            except Exception as error:
                logger.warning("sessions cannot be kept up: %s", error)

    async def close(self) -> None:
        """Wait for what runs, and close the database."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._upkeep
        try:
            await self._catch_up()
        except StoreError as error:
            logger.warning("lost answers: %d (%s)", len(self._postponed), error)
        for lanes in (self._lanes, self._looking, self._leasing):
            lanes.close()
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)


def _lane(owner: str, session_id: str = "") -> str:
    return f"{hash(session_id) % PER_OWNER} {owner}"
