"""Turns: questions to a session and their answers, whoever listens. Tornado loop only.

A turn is a request like any other: an `Exchange` of its own that passes all stages, without a
client's connection. Its events go to an `EventLog`, which readers follow and come back to. What it
comes to is stored; the store's calls run on threads (`Shelf`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any, Literal

from llmkit.gateway.access.held import Held
from llmkit.gateway.access.identity import Identity
from llmkit.gateway.aside import Aside
from llmkit.gateway.conversations.detached import TurnExchange, Wish
from llmkit.gateway.conversations.keeping import Keeping
from llmkit.gateway.conversations.log import EventLog, TurnEvent
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.ids import new_id

__all__ = ["Turn", "TurnEvent", "Turns"]

logger = logging.getLogger("llmkit.gateway")

KEPT_S, KEPT_BYTES, KEPT = 300.0, 64 << 20, 1000  # of turns that are over
NEW = "new"  # the id of a session that a turn makes
NUM_RENDERING, NUM_COUNTING = 4, 4  # threads
Content = str | list[dict[str, Any]]


class Turn:
    """A question and its answer under way, or just over.

    ``message_id`` is the reply's, ``parent_id`` what it answers. ``headers`` are those of the
    answer that say what became of the request, such as ``x-llmkit-clamped``.
    """

    def __init__(self, owner: str, session_id: str, num_asked_bytes: int = 0) -> None:
        self._num_asked_bytes = num_asked_bytes
        self.id = new_id("turn", "_")
        self.owner, self.session_id = owner, session_id
        self.message_id = ""
        self.parent_id: str | None = None
        self.model = ""
        self.headers: dict[str, str] = {}
        self.is_streamed = False  # whether its caller asked for events
        self.appended: list[dict[str, Any]] = []  # the messages stored with it
        self.keeping: Keeping | None = None
        self.log = EventLog()
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self.failure: ApiError | None = None
        self.is_settling = False  # generated, and about to be stored
        self.over_at: float | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.log.is_closed

    @property
    def num_bytes(self) -> int:
        """What it takes in memory: its events, and what was asked."""
        return self.log.num_bytes + self._num_asked_bytes

    async def events(self, after: int = 0) -> AsyncIterator[TurnEvent]:
        """The events after number ``after`` as they come, to the last one."""
        async for event in self.log.follow(after):
            if event is not None:
                yield event

    def cancel(self) -> None:
        """End the answer here; what it has so far is kept as partial."""
        if self.task is not None and not self.is_settling:
            self.task.cancel()

    def begin(
        self, keeping: Keeping, appended: list[dict[str, Any]], headers: dict[str, str]
    ) -> None:
        """Question and reply are stored."""
        reply = keeping.reply
        self.keeping, self.appended, self.headers = keeping, appended, headers
        self.session_id, self.message_id = reply.conversation_id, reply.id
        self.parent_id, self.model = reply.parent_id, reply.model
        self.log.add("start", message=keeping.shown)
        self.begun.set()

    async def settle(self) -> None:
        """The answer is whole: store it, and tell. Raises what the store raises."""
        assert self.keeping is not None
        await self.keeping.end()
        self._tell("end")

    def settle_as(self, failure: ApiError | None, request_id: str) -> None:
        """Its request is over, and the answer stored as far as it could be. Tell if nobody has."""
        if self.log.is_closed:
            return
        self.failure = failure
        if self.keeping is None:
            self.log.is_closed = True
        elif failure is None:
            self._tell("end")
        else:
            self._tell("error", error=failure.body("openai", request_id)["error"])

    def _tell(self, kind: Literal["end", "error"], **more: Any) -> None:
        assert self.keeping is not None
        shown, size = self.keeping.shown, self.keeping.size
        self.log.add(kind, is_last=True, message=shown, usage=shown["usage"], size=size, **more)


class Turns:
    """The turns of a gateway.

    ``dispatch`` runs an exchange through the gateway's stages, ``held`` counts the bytes of
    questions. Without a ``shelf`` there are no sessions: everything raises the `ApiError` that
    says so. ``rendering`` makes pages of what is stored, and of what turns say.
    """

    def __init__(
        self,
        dispatch: Callable[[Exchange], Awaitable[None]],
        held: Held,
        shelf: Shelf | None = None,
    ) -> None:
        self._dispatch, self._held, self._shelf = dispatch, held, shelf
        self._turns: dict[str, Turn] = {}  # by id
        self._over: deque[Turn] = deque()  # in the order of their ends
        self._num_over_bytes = 0
        self.num_settling = 0  # those that are generated, and about to be stored
        self._finishing: set[asyncio.Task[None]] = set()
        self.rendering = Aside(NUM_RENDERING, "llmkit-rendering")
        self._counting: dict[str, Aside] = {}  # by model

    @property
    def is_on(self) -> bool:
        """Whether there are sessions."""
        return self._shelf is not None

    @property
    def shelf(self) -> Shelf:
        """The store. Raises `ApiError` where there is none."""
        if self._shelf is None:
            raise ApiError(
                501,
                "Sessions are off: this gateway has no database. Set db_url, or leave out "
                "sessions = false.",
                "server_error",
                code="sessions_off",
                headers={"x-should-retry": "false"},
            )
        return self._shelf

    def counting(self, model: str) -> Aside:
        """What counts a model's tokens, and waits for it: another model's callers do not."""
        if model not in self._counting:
            self._counting[model] = Aside(NUM_COUNTING, "llmkit-counting")
        return self._counting[model]

    async def start(
        self,
        identity: Identity,
        address: str,
        wish: Wish,
        body: Mapping[str, Any] | bytes,
        headers: Mapping[str, str] | None = None,
    ) -> Turn:
        """Begin a turn as a request for it says, see `TurnBody`; without a session in a new one.

        Returns once question and reply are stored. Raises `ApiError`; then nothing was stored.
        """
        use = self.shelf.uses.begin()
        if wish.session_id is not None:
            use.of(wish.session_id)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        turn = Turn(identity.name, wish.session_id or "", len(data))
        exchange = TurnExchange(
            turn,
            wish,
            data,
            headers or {},
            identity,
            self._held,
            address,
            path=f"/v1/sessions/{wish.session_id or NEW}/messages",
        )
        self._turns[turn.id] = turn
        # A context of its own: what belongs to another request of this task must not follow it.
        turn.task = asyncio.create_task(self._run(turn, exchange), context=Context())
        turn.task.add_done_callback(lambda _: self._ended(turn))
        turn.task.add_done_callback(lambda _: use.end())
        try:
            await turn.begun.wait()
        except asyncio.CancelledError:  # who wanted it has left before there was anything of it
            if not turn.begun.is_set():
                turn.cancel()
            raise
        if turn.keeping is None and not turn.appended:
            raise turn.failure or cancelled()
        return turn

    async def _run(self, turn: Turn, exchange: TurnExchange) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # by whoever stopped it
            await self._dispatch(exchange)
        turn.is_settling = True
        self.num_settling += 1
        failure = exchange.failure
        keeping = turn.keeping
        if keeping is not None:
            try:
                await keeping.end(failure)
            except Exception as error:
                logger.warning("the answer of %s could not be stored: %s", turn.id, error)
                failure = failure or api_error(error)
        turn.headers = exchange.answer_headers
        turn.settle_as(failure, exchange.request_id)

    def _ended(self, turn: Turn) -> None:
        self.num_settling -= turn.is_settling
        turn.over_at = asyncio.get_running_loop().time()
        turn.begun.set()
        turn.over.set()
        if turn.keeping is None:
            del self._turns[turn.id]
        else:
            self._over.append(turn)
            self._num_over_bytes += turn.num_bytes
        self._forget()

    def _forget(self) -> None:
        """Let go of what has been over for long, and of the oldest when it is too much."""
        now = asyncio.get_running_loop().time()
        while self._over:
            turn = self._over[0]
            is_old = now - (turn.over_at or now) >= KEPT_S
            is_much = self._num_over_bytes > KEPT_BYTES or len(self._over) > KEPT
            if not (is_old or is_much):
                return
            self._over.popleft()
            self._num_over_bytes -= turn.num_bytes
            del self._turns[turn.id]

    def find(self, identity: Identity, turn_id: str) -> Turn:
        """A turn under way, or over for less than five minutes. Raises `ApiError`."""
        self._forget()
        turn = self._turns.get(turn_id)
        if turn is None or turn.owner != identity.name or turn.keeping is None:
            raise ApiError(
                404,
                f"There is no turn {turn_id!r:.60}: it never started, or ended too long ago; "
                "the session has its messages.",
                code="not_found",
            )
        return turn

    def running(self, identity: Identity, session_id: str | None = None) -> list[Turn]:
        """A caller's turns under way, oldest first."""
        return [
            turn
            for turn in self._turns.values()
            if turn.owner == identity.name
            and turn.keeping is not None
            and not turn.is_over
            and session_id in (None, turn.session_id)
        ]

    def finish(self, ending: Coroutine[Any, Any, None]) -> None:
        """Have the answer of a request, which may be over, stored to its end."""

        async def run() -> None:
            try:
                await ending
            except Exception as error:
                logger.warning("an answer could not be stored: %s", error)

        self._finishing.add(task := asyncio.ensure_future(run()))
        task.add_done_callback(self._finishing.discard)

    async def stop(self, identity: Identity, session_id: str | None = None) -> None:
        """End a caller's turns, of all its sessions or of one, and wait until that is stored."""
        await self._stop(self.running(identity, session_id))

    async def stop_all(self) -> None:
        """End all turns as partial, and wait until that is stored."""
        await self._stop(list(self._turns.values()))
        if self._finishing:
            await asyncio.wait(self._finishing)

    async def close(self) -> None:
        """The same, and close the store."""
        await self.stop_all()
        for aside in (self.rendering, *self._counting.values()):
            aside.close()
        if self._shelf is not None:
            await self._shelf.close()

    @staticmethod
    async def _stop(turns: list[Turn]) -> None:
        tasks = [t.task for t in turns if t.task is not None and not t.task.done()]
        for turn in turns:
            turn.cancel()
        if tasks:
            await asyncio.wait(tasks)


def cancelled() -> ApiError:
    message = "The turn was cancelled before it began; nothing was stored."
    return ApiError(503, message, "server_error", code="cancelled")
