"""Authenticates callers of a gateway that runs without Jupyter, by their keys. Tornado loop only.

Keys are known by the SHA-256 of their secrets. How long a look-up takes tells nothing of a secret,
since nobody can choose what a hash begins with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from hmac import compare_digest

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.authenticator import ANONYMOUS, Facts, given_key, is_open
from llmkit.gateway.access.cors import Cors
from llmkit.gateway.access.grants import Grant
from llmkit.gateway.access.identity import SCOPES, Allowance, Identity
from llmkit.gateway.access.proxies import FORWARDING, is_loopback
from llmkit.gateway.access.throttle import Throttle
from llmkit.gateway.failures import ApiError
from llmkit.settings.entries import KeyEntry
from llmkit.store.records import KeyRecord, digest, is_generated

__all__ = ["Keys", "is_loopback"]

MAX_GIVEN = 1000
UNLIMITED = Allowance()


class Keys:
    """The keys of a server: ``key`` alone, ``entries`` of the settings file, ``stored`` ones.

    Without any, callers on this machine need none, on a loopback ``host``; ``keyless`` is what each
    of their addresses may use. Once there was a key, every caller needs one. ``on_use`` hears of
    stored keys that are used.

    Raises `InvalidRequestError` for a host that others can reach without a key.
    """

    def __init__(
        self,
        key: str | None,
        host: str,
        *,
        entries: Sequence[KeyEntry] = (),
        stored: Sequence[KeyRecord] = (),
        keyless: Allowance = UNLIMITED,
        cors: Cors | None = None,
        now: Callable[[], float] = time.time,
        on_use: Callable[[str, float], None] = lambda sha256, now: None,
        throttle: Throttle | None = None,
    ) -> None:
        self._host, self._now, self._on_use = host, now, on_use
        self._throttle = throttle or Throttle()
        self._is_closed = False
        self.take_stored(stored)
        self.replace(key, entries, keyless=keyless, cors=cors)

    def replace(
        self,
        key: str | None,
        entries: Sequence[KeyEntry],
        *,
        keyless: Allowance = UNLIMITED,
        cors: Cors | None = None,
    ) -> None:
        """Other settings in place of those before. Raises `InvalidRequestError`, unchanged."""
        now = self._now()
        grants = [Grant.of_entry(entry, now) for entry in entries]
        if key is not None:
            grants.append(Grant.of_owner(key))
        cors = cors or Cors(local=True)
        if not (grants or self._is_closed):
            _check_keyless(self._host, cors)
        self._given = {grant.sha256: grant for grant in grants}
        if grants:  # never set to what was read before: the other thread may have closed it since
            self._is_closed = True
        self._cors = cors
        self._local = Identity("local", allowance=keyless)
        self._owner = Identity("local", scopes=frozenset(SCOPES), allowance=keyless)

    def take_stored(self, records: Sequence[KeyRecord]) -> None:
        """Other keys in place of those of the database. Any thread."""
        self._stored = {r.sha256: Grant.of_record(r) for r in records}
        if records:
            self._is_closed = True

    @property
    def is_open(self) -> bool:
        """Whether callers on this machine need no key."""
        return not self._is_closed

    async def identify(self, facts: Facts) -> Identity:
        """The caller. Raises `ApiError`."""
        if not self._is_closed:
            return self._keyless(facts)
        given = given_key(facts.headers)
        if is_open(facts.path) and not given:
            return ANONYMOUS
        try:
            return self._holder(given, facts.address)
        except ApiError:
            if is_open(facts.path):
                return ANONYMOUS
            raise

    def _holder(self, given: str, address: str) -> Identity:
        if not given:
            raise _refusal("No API key provided: send it as `Authorization: Bearer KEY`.")
        wait_s = self._throttle.wait_s(address)
        # Nobody guesses a generated key: its holders are not kept out by a neighbour who tries.
        if wait_s and not is_generated(given):
            raise _throttled(wait_s)
        sha256 = digest(given[:MAX_GIVEN])
        grant = self._given.get(sha256) or self._stored.get(sha256)
        now = self._now()
        if grant is not None and compare_digest(grant.sha256, sha256):
            ending = grant.ending(now)
            if not ending:
                if grant.is_stored:
                    self._on_use(sha256, now)
                return grant.identity
            raise _refusal(f"This API key {ending}. Ask whoever runs this server for another one.")
        self._throttle.note(address)
        if wait_s:
            raise _throttled(wait_s)
        raise _refusal("Incorrect API key provided.")

    def _keyless(self, facts: Facts) -> Identity:
        """Anyone on this machine, but no web page.

        A page may point its own name to 127.0.0.1 (DNS rebinding) or post to it blindly.
        """
        if not is_loopback(facts.host):
            raise ApiError(
                403,
                f"The host {facts.host!r:.100} is not this server's. "
                "Use 127.0.0.1, or start the server with a key.",
                code="forbidden_host",
            )
        origin = facts.headers.get("Origin")
        if origin and not self._cors.allows(origin):
            raise ApiError(
                403,
                "Requests from other websites are refused; name them in cors_origins "
                "to allow them.",
                code="forbidden_origin",
            )
        # Whom a proxy lets in is a caller, but not the owner of this machine; nor is whoever comes
        # through one on it that nobody named, whose address is the machine's own.
        is_owner = is_loopback(facts.address) and not any(n in facts.headers for n in FORWARDING)
        return self._owner if is_owner else self._local


def _check_keyless(host: str, cors: Cors) -> None:
    if not is_loopback(host):
        raise InvalidRequestError(
            f"refusing to serve on {host} without a key: anyone who can reach this machine "
            "could use the model. Make one with `llmkit keys add NAME`, or give one in "
            "$LLMKIT_API_KEY, or stay on --host 127.0.0.1.",
            "api_key",
        )
    if cors.is_any:
        raise InvalidRequestError(
            "refusing to let every website in without a key: any page that you open could use "
            "the model. Name origins in cors_origins, or use keys.",
            "cors_origins",
        )


def _refusal(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        "authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _throttled(wait_s: float) -> ApiError:
    return ApiError(
        429,
        "Too many wrong API keys came from this address; try again later.",
        "rate_limit_error",
        code="too_many_attempts",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )
