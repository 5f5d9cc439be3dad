"""One client's socket: who it is, its messages, and the turns that it follows. Tornado loop only.

Knows no Tornado: an adapter hands messages in, and is what they are sent by (`Wire`). Turns go on
without it: a client that comes back resumes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import msgspec

from llmkit.gateway.access.identity import INFERENCE, LOCAL, Identity, counted_as
from llmkit.gateway.exchange import ClientGoneError
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.sockets import messages
from llmkit.gateway.sockets.following import follow
from llmkit.gateway.sockets.messages import ServerMessage
from llmkit.gateway.sockets.plain import PlainExchange, body_of, path_of
from llmkit.gateway.sockets.starting import start
from llmkit.version import __version__

if TYPE_CHECKING:
    from llmkit.gateway.conversations.turns import Turn
    from llmkit.gateway.sockets.room import SocketRoom

__all__ = ["Caller", "Connection", "Wire"]

logger = logging.getLogger("llmkit.gateway")

AUTH_S = 10.0  # in which an unknown client must say who it is
LAST_WORD_S = 1.0  # in which a client that is sent away is told why
MAX_TASKS = 64  # turns and bodies under way on one socket
# Codes of closing, by RFC 6455 and IANA.
GOING_AWAY, UNWANTED, RESTARTING, TRY_LATER = 1001, 1008, 1012, 1013


class Wire(Protocol):
    """What a connection needs of its socket."""

    async def send(self, frame: bytes) -> None:
        """Send a text frame, and wait while the client does not read.

        Raises `ClientGoneError` if it is gone, or has read nothing for long.
        """
        ...

    def accept(self) -> None:
        """The caller is known: its messages may be as long as bodies."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake."""
        ...


class Caller(Protocol):
    """Who is at the other end."""

    def give(self, key: str) -> None:
        """Its key came."""
        ...

    async def identify(self) -> Identity:
        """Who it is now. Raises `ApiError`, also if it may not even ``read`` any more."""
        ...

    async def permit(self, action: str) -> None:
        """It wants to ``read`` or to ``execute``. Raises `ApiError`."""
        ...


class Unwelcome(Exception):
    """Ends the socket, for the ``reason``."""

    def __init__(self, reason: ApiError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class Connection:
    """A socket from its handshake to its end.

    With ``greets`` its first message is a `Hello`, as soon as the caller is known; else a client's
    first typed message is answered by one: other services' clients expect nothing but an answer.
    """

    def __init__(
        self, room: SocketRoom, wire: Wire, caller: Caller, address: str, *, greets: bool
    ) -> None:
        self._room, self._wire, self._caller, self._address = room, wire, caller, address
        self._greets, self._has_greeted = greets, False
        self._identity: Identity | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: dict[str, asyncio.Task[None]] = {}  # by turn
        self._order: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by session
        self._deadline: asyncio.Task[None] | None = None
        self._is_leaving = self._is_over = False

    @property
    def counted_as(self) -> str:
        """Whose limits its bytes count for."""
        return counted_as(self._identity or LOCAL, self._address)

    @property
    def is_busy(self) -> bool:
        """Whether turns are followed or bodies answered."""
        return bool(self._tasks)

    async def open(self, identity: Identity | None, key: str | None = None) -> None:
        """The handshake is over, which told the ``identity`` or the ``key``, or neither."""
        async with self._answering():
            if identity is not None:
                await self._admit(identity)
                return
            self._enter(None)
            if key is not None:
                await self._authenticate(key)
            else:
                self._deadline = asyncio.create_task(self._expire())

    async def receive(self, text: str | bytes) -> None:
        """A message. Returns when it is answered or under way; the next is read after that."""
        if self._is_over:
            return
        head = messages.Head()
        async with self._answering(lambda: head.ref):
            if isinstance(text, bytes):
                raise ApiError(400, "Send text frames, not binary ones.", code="invalid_message")
            data = text.encode()
            head = messages.head_of(data)
            if self._identity is None:
                await self._meet(data, head)
                return
            identity = await self._known()
            if head.is_body:
                await self._caller.permit("execute")
                self._begin(self._post(identity, head, data))
            else:
                message = messages.read(data)
                await self._greet()
                await self._take(identity, message)

    async def check(self) -> None:
        """End it if its caller, as far as it is known, is not welcome any more."""
        if self._identity is None or self._is_over:
            return
        async with self._answering():
            await self._known()

    async def leave(self) -> None:
        """The server shuts down: end it now, or once nothing is under way."""
        if self._is_leaving:
            return
        self._is_leaving = True
        message = "This server is shutting down; what is under way is finished if time allows."
        error = ApiError(503, message, "server_error", code="shutting_down")
        with contextlib.suppress(ClientGoneError):
            await self._say(messages.Failed(messages.fault_of(error)))
        self._leave_if_idle()

    def cut(self) -> None:
        """The server has ended."""
        self._close(RESTARTING if self.is_busy else GOING_AWAY, "shutting_down")

    def closed(self) -> None:
        """The socket is closed: nothing is followed any more."""
        self._is_over = True
        for task in [*self._tasks, *([] if self._deadline is None else [self._deadline])]:
            task.cancel()
        self._room.leave(self)

    @contextlib.asynccontextmanager
    async def _answering(self, ref: Callable[[], str | None] = lambda: None) -> AsyncIterator[None]:
        """Answers whatever is raised; `Unwelcome` ends the socket."""
        with contextlib.suppress(ClientGoneError):
            try:
                yield
            except Unwelcome as error:
                await self._end(error.reason)
            except ClientGoneError:
                raise
            except Exception as error:
                await self._say(_failed(error, ref()))

    async def _end(self, reason: ApiError) -> None:
        code = TRY_LATER if reason.code == "too_many_sockets" else UNWANTED
        self._is_over = True
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await self._say(_failed(reason))
        except TimeoutError:
            logger.info("a socket was closed without a word: its client reads nothing")
        finally:
            self._close(code, reason.code or reason.type)

    def _close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; nothing more is taken."""
        self._is_over = True
        self._wire.close(code, reason)

    async def _say(self, message: ServerMessage) -> None:
        await self._wire.send(messages.encode(message))

    async def _expire(self) -> None:
        await asyncio.sleep(AUTH_S)
        with contextlib.suppress(ClientGoneError):
            await self._end(
                _refusal(
                    f"No key came within {AUTH_S:.0f} s: send it with the handshake, or at once "
                    "in an auth message.",
                    "authentication_timeout",
                )
            )

    async def _meet(self, data: bytes, head: messages.Head) -> None:
        """The first message of a caller that is not known yet must be its key."""
        if head.type != "auth":
            raise Unwelcome(
                _refusal('No API key provided: send {"type": "auth", "key": KEY} first.')
            )
        message = messages.read(data)
        assert isinstance(message, messages.Auth)
        await self._authenticate(message.key)

    async def _authenticate(self, key: str) -> None:
        self._caller.give(key)
        try:
            identity = await self._caller.identify()
        except ApiError as error:
            raise Unwelcome(error) from None
        if self._deadline is not None:
            self._deadline.cancel()
        self._greets = True
        await self._admit(identity)

    async def _admit(self, identity: Identity) -> None:
        self._enter(identity)
        self._identity = identity
        self._wire.accept()
        if self._greets:
            await self._greet()

    def _enter(self, identity: Identity | None) -> None:
        try:
            self._room.enter(self, identity, self._address)
        except ApiError as error:
            raise Unwelcome(error) from None

    async def _greet(self) -> None:
        if not self._has_greeted and self._identity is not None:
            self._has_greeted = True
            models = self._room.models(self._identity)
            await self._say(messages.Hello(__version__, models, self._room.max_message_bytes()))

    async def _known(self) -> Identity:
        """The caller as it is now: its key may have other rights, or none."""
        try:
            identity = await self._caller.identify()
        except ApiError as error:
            raise Unwelcome(error) from None
        if self._identity is not None and identity.name != self._identity.name:
            raise Unwelcome(_refusal("This key now belongs to another caller; reconnect."))
        self._identity = identity
        return identity

    async def _take(self, identity: Identity, message: messages.ClientMessage) -> None:
        match message:
            case messages.Auth(key):
                self._caller.give(key)
                await self._known()
            case messages.Ping(data):
                await self._say(messages.Pong(data))
            case messages.Resume():
                await self._caller.permit("read")
                turn = self._room.turns.find(identity, message.turn)
                self._begin(self._resume(turn, message))
            case messages.Cancel():
                await self._caller.permit("execute")
                _check_scope(identity)
                self._room.turns.find(identity, message.turn).cancel()
            case _:
                await self._caller.permit("execute")
                self._begin(self._answer(identity, message))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= MAX_TASKS:
            work.close()
            raise ApiError(
                429,
                f"{MAX_TASKS} turns are under way on this socket; wait until one is over.",
                "rate_limit_error",
                code="too_many_turns",
            )
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._is_over:
            self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self._is_leaving and not self.is_busy:
            self._close(GOING_AWAY, "shutting_down")

    async def _answer(
        self, identity: Identity, message: messages.Send | messages.Edit | messages.Regenerate
    ) -> None:
        """Begin a turn and follow it. Turns of one session begin in the order of their messages."""
        async with self._answering(lambda: message.ref):
            key = message.session or f"new {id(message)}"
            with self._holding(identity, message):
                async with self._order.setdefault(key, asyncio.Lock()):
                    turn = await start(self._room.turns, identity, self._address, message)
            await self._follow(turn, 0, message.ref, render=message.render)

    @contextlib.contextmanager
    def _holding(self, identity: Identity, message: msgspec.Struct) -> Iterator[None]:
        """Count a message that waits for its turn to begin. Raises `ApiError` if it is too much."""
        who, size = counted_as(identity, self._address), len(msgspec.json.encode(message))
        self._room.held.add(who, size)
        try:
            yield
        finally:
            self._room.held.add(who, -size)

    async def _resume(self, turn: Turn, message: messages.Resume) -> None:
        async with self._answering(lambda: message.ref):
            await self._follow(turn, message.after, message.ref, render=message.render)

    async def _follow(self, turn: Turn, after: int, ref: str | None, *, render: bool) -> None:
        """Send what comes of a turn, in place of whatever follows it on this socket."""
        task = asyncio.current_task()
        assert task is not None
        before = self._following.get(turn.id)
        if before is not None:
            before.cancel()
        self._following[turn.id] = task
        try:
            await self._say(
                messages.TurnStarted(
                    turn.id, turn.session_id, turn.message_id, turn.model, turn.parent_id, ref
                )
            )
            renders = self._room.turns.rendering if render else None
            async for message in follow(turn, after, renders, self.counted_as):
                await self._say(message)
        finally:
            if self._following.get(turn.id) is task:
                del self._following[turn.id]

    async def _post(self, identity: Identity, head: messages.Head, data: bytes) -> None:
        """Answer a body as the route does that it is for."""
        exchange = PlainExchange(
            path_of(head),
            body_of(head, data),
            self._wire.send,
            identity,
            self._room.held,
            self._address,
        )
        with contextlib.suppress(ClientGoneError):
            await self._room.dispatch(exchange)
            if exchange.last is not None:
                await self._wire.send(exchange.last)


def _failed(error: Exception, ref: str | None = None) -> messages.Failed:
    answer = api_error(error)
    if answer.code == "internal_error":
        logger.error("a message of a socket failed", exc_info=error)
    return messages.Failed(messages.fault_of(answer), ref=ref)


def _refusal(message: str, code: str = "invalid_api_key") -> ApiError:
    return ApiError(401, message, "authentication_error", code=code)


def _check_scope(identity: Identity) -> None:
    if INFERENCE not in identity.scopes:
        raise ApiError(
            403,
            f"This needs the scope {INFERENCE!r}, which this caller does not have.",
            "permission_error",
            code="insufficient_scope",
        )
