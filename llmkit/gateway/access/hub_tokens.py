"""What a JupyterHub has said about tokens: whose each is, for how long that counts, and how it is
asked without being flooded.

Tornado loop only. Knows nothing of how a hub is asked: `Asks` does.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmkit.gateway.access.throttle import Throttle
from llmkit.gateway.failures import ApiError

__all__ = ["Asks", "HubGoneError", "NoHubError", "Owner", "TokenOwners"]

logger = logging.getLogger("llmkit.gateway")

MAX_KNOWN, MAX_OF_OWNER, MAX_UNKNOWN = 10_000, 100, 1_000
MAX_AT_ONCE = 16  # questions to the hub
MAX_DOUBTFUL, MAX_DOUBTFUL_WAITING = 2, 200  # those from addresses that sent many wrong tokens
BRIDGED_S = 300.0  # how long those who are known go on while the hub does not answer
PAUSE_S = 2.0  # between two questions to a hub that does not answer
PATIENCE_S = 1.0  # after that who was known goes on, and the question with it


class HubGoneError(Exception):
    """The hub does not answer."""


class NoHubError(HubGoneError):
    """What answers is not a hub."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a token is, and what it may: its scopes are those of the token."""

    name: str
    kind: str
    groups: frozenset[str]
    scopes: frozenset[str]

    @property
    def key(self) -> tuple[str, str]:
        """A user and a service may have the same name."""
        return self.kind, self.name

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Owner:
        """As a hub says it."""
        kind = "service" if model.get("kind") == "service" else "user"
        groups, scopes = model.get("groups") or (), model.get("scopes") or ()
        return cls(str(model["name"]), kind, frozenset(groups), frozenset(scopes))


class Asks(Protocol):
    """Asks a hub whose a token is."""

    async def owner(self, token: str) -> Owner | None:
        """None for a token that is no token, or no longer. Raises `HubGoneError`, or `NoHubError`
        where something else answers."""
        ...


@dataclass(slots=True)
class _Known:
    owner: Owner
    asked_at: float


class TokenOwners:
    """What the hub has said about tokens, for ``cache_s`` seconds, of the last 10,000.

    While the hub does not answer, what it said within five minutes counts. A token may be right
    whatever its address has sent before, so nobody is locked out: after many wrong ones the
    address's questions go to the hub a few at a time, and no other ones wait for them.
    """

    def __init__(
        self,
        asks: Asks,
        cache_s: float,
        *,
        now: Callable[[], float] = time.monotonic,
        throttle: Throttle | None = None,
        most: int = MAX_KNOWN,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.cache_s = cache_s
        self._asks, self._now, self._patience_s = asks, now, patience_s
        self._throttle = throttle or Throttle()
        self._known = _KnownTokens(most)
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Owner | None]] = {}
        self._at_once = asyncio.Semaphore(MAX_AT_ONCE)
        self._doubtful = asyncio.Semaphore(MAX_DOUBTFUL)
        self._num_doubtful = 0
        self._gone_until = self._slow_until = -math.inf
        self._is_away = False

    async def owner(self, token: str, session: str, address: str) -> Owner | None:
        """None for a token that the hub does not know. Raises `ApiError`: 503, or 429."""
        key = hashlib.sha256(f"{session}\n{token}".encode()).hexdigest()
        known = self._known.get(key)
        if known is None:
            return await self._stranger(key, token, address)
        age_s = self._now() - known.asked_at
        if age_s < self.cache_s:
            return known.owner
        is_bridged = age_s < max(self.cache_s, BRIDGED_S)
        try:
            task = self._ask(key, token)
            if is_bridged and self._now() < self._slow_until:
                return known.owner
            async with asyncio.timeout(self._patience_s if is_bridged else None):
                return await asyncio.shield(task)
        except TimeoutError:
            self._slow_until = self._now() + PAUSE_S
            return known.owner
        except HubGoneError as error:
            if is_bridged:
                return known.owner
            raise _hub_gone(error) from None

    async def _stranger(self, key: str, token: str, address: str) -> Owner | None:
        if self._now() - self._unknown.get(key, -math.inf) < self.cache_s:
            return None
        is_doubtful = key not in self._asking and self._throttle.wait_s(address) > 0
        try:
            if is_doubtful:
                owner = await self._doubted(key, token)
            else:
                owner = await asyncio.shield(self._ask(key, token))
        except HubGoneError as error:
            raise _hub_gone(error) from None
        # Whoever makes up a session for each request costs the hub as much as with a token.
        if owner is None or self._known.is_crowded(owner):
            self._throttle.note(address)
        return owner

    async def _doubted(self, key: str, token: str) -> Owner | None:
        if self._num_doubtful >= MAX_DOUBTFUL_WAITING:
            raise _throttled()
        self._num_doubtful += 1
        try:
            async with self._doubtful:
                return await asyncio.shield(self._ask(key, token))
        finally:
            self._num_doubtful -= 1

    def _ask(self, key: str, token: str) -> asyncio.Task[Owner | None]:
        """One question for all who wait for the same answer. Raises `HubGoneError`."""
        task = self._asking.get(key)
        if task is None:
            self._check_hub()
            task = self._asking[key] = asyncio.create_task(self._asked(key, token))
            task.add_done_callback(lambda task: self._is_answered(key, task))
        return task

    def _is_answered(self, key: str, task: asyncio.Task[Owner | None]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # nobody may have waited for it

    def _check_hub(self) -> None:
        """Raises `HubGoneError` while the hub is left alone."""
        if self._now() < self._gone_until:
            raise HubGoneError("the hub does not answer")

    async def _asked(self, key: str, token: str) -> Owner | None:
        async with self._at_once:
            self._check_hub()  # it may have gone while this waited
            began = self._now()
            try:
                owner = await self._asks.owner(token)
            except HubGoneError as error:
                self._gone_until = self._now() + PAUSE_S
                self._say(error)
                raise
        self._say(None)
        if owner is None:
            self._known.forget(key)
            self._unknown[key] = began
            self._unknown.move_to_end(key)
            if len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)
        else:
            self._unknown.pop(key, None)
            self._known.put(key, _Known(owner, began))
        return owner

    def _say(self, error: HubGoneError | None) -> None:
        """Once for each outage."""
        if error is not None and not self._is_away:
            logger.warning("tokens cannot be verified: %s", error)
        elif error is None and self._is_away:
            logger.warning("the hub answers again")
        self._is_away = error is not None


class _KnownTokens:
    """The last ``most`` answers of the hub, and of each owner the last 100: whoever makes up
    sessions, or makes many tokens, displaces its own only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._of_owner: dict[tuple[str, str], OrderedDict[str, None]] = {}

    def get(self, key: str) -> _Known | None:
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self._of_owner[known.owner.key].move_to_end(key)
        return known

    def put(self, key: str, known: _Known) -> None:
        self.forget(key)
        own = self._of_owner.get(known.owner.key) or OrderedDict()
        if len(own) >= MAX_OF_OWNER:
            self.forget(next(iter(own)))
        elif len(self._known) >= self._most:
            self.forget(next(iter(self._known)))
        self._known[key] = known
        self._of_owner.setdefault(known.owner.key, OrderedDict())[key] = None

    def forget(self, key: str) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            own = self._of_owner[known.owner.key]
            del own[key]
            if not own:
                del self._of_owner[known.owner.key]

    def is_crowded(self, owner: Owner) -> bool:
        """Whether an owner has as many as it may."""
        return len(self._of_owner.get(owner.key, ())) >= MAX_OF_OWNER


def _throttled() -> ApiError:
    return ApiError(
        429,
        "Too many new tokens are being verified for addresses that have sent many wrong ones; try "
        "again soon.",
        "rate_limit_error",
        code="too_many_attempts",
        headers={"Retry-After": "2"},
    )


def _hub_gone(error: HubGoneError) -> ApiError:
    reason = (
        "This service does not reach its hub; its log tells the admin why"
        if isinstance(error, NoHubError)
        else "The hub does not answer"
    )
    return ApiError(
        503,
        f"{reason}, so the token cannot be verified; try again soon.",
        "server_error",
        code="hub_unavailable",
        headers={"Retry-After": "5"},
    )
