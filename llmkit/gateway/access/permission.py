"""What a caller may see and do: its scopes, and the models that are there for it.

A model that a caller may not use does not exist for it: names are looked up and listed by those
that `may_use` lets through. Tornado loop only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import TYPE_CHECKING

from llmkit.errors import ModelNotFoundError
from llmkit.gateway.access.authenticator import is_open
from llmkit.gateway.failures import ApiError

if TYPE_CHECKING:
    from llmkit.gateway.access.identity import Identity
    from llmkit.gateway.exchange import Exchange
    from llmkit.gateway.pipeline import Stage
    from llmkit.gateway.reading import Admission

__all__ = ["Allowed", "admitting", "may_use", "permitting", "seeing"]

ALL = ("*",)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What anyone may use: ``globs`` gives those of models, none means all. A model also matches,
    here and in a caller's own list, by what ``aliases`` gives for its name."""

    globs: Callable[[], Sequence[str]]
    aliases: Callable[[str], Sequence[str]] = lambda _: ()

    def __call__(self) -> Sequence[str]:
        return self.globs()


@dataclass(frozen=True, slots=True)
class _Visible:
    """Lists of globs, each of which a model must match."""

    lists: tuple[tuple[str, ...], ...]
    aliases: Callable[[str], Sequence[str]]


_visible: ContextVar[_Visible | None] = ContextVar("visible", default=None)


def may_use(model: str) -> bool:
    """Whether the caller of this task's request may use a model; anyone may outside one.

    ``name@kernel`` is ``name``.
    """
    visible = _visible.get()
    if visible is None:
        return True
    bare = model.rpartition("@")[0] or model
    names = (model, bare, *visible.aliases(bare))
    return all(any(_matches(globs, name) for name in names) for globs in visible.lists)


@lru_cache(4096)
def _matches(globs: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(_pattern(glob), name) for glob in globs)


@lru_cache(1024)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))


def permitting(everybody: Callable[[], Sequence[str]] = tuple) -> Stage:
    """Refuses what a caller's scopes do not cover, and hides other models than its own.

    ``everybody`` gives the globs of models that anyone may use; none means all.
    """

    @contextlib.contextmanager
    def stage(exchange: Exchange) -> Iterator[None]:
        identity = exchange.identity
        if not is_open(exchange.path):
            _check(exchange.scope, identity.scopes)
        with seeing(identity, everybody):
            yield

    return stage


@contextlib.contextmanager
def seeing(identity: Identity, everybody: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """Within it, this task sees the models that a caller may use; ``everybody`` as above."""
    globs = (identity.allowance.models, tuple(everybody()) or ALL)
    lists = tuple(g for g in globs if g != ALL)
    if not lists:
        yield
        return
    aliases = everybody.aliases if isinstance(everybody, Allowed) else lambda _: ()
    token = _visible.set(_Visible(lists, aliases))
    try:
        yield
    finally:
        _visible.reset(token)


def _check(needed: str, scopes: frozenset[str]) -> None:
    """``needed`` is a scope; empty means any."""
    if needed in scopes or (not needed and scopes):
        return
    message = (
        f"This needs the scope {needed!r}, which this caller does not have."
        if needed
        else "This caller has no scope."
    )
    raise ApiError(403, message, "permission_error", code="insufficient_scope")


def admitting(name_of: Callable[[str], Awaitable[str | None]]) -> Admission:
    """Refuses a model to whoever may not use it, before it is loaded for the request.

    ``name_of`` gives the name of a model that is known here, by whatever a request calls it.
    """

    async def admit(exchange: Exchange, model: str) -> None:
        name = await name_of(model)
        if name is not None and not may_use(name):
            raise ModelNotFoundError(f"There is no model {model!r} here.")

    return admit
