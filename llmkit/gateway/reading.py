"""Reads the body of an exchange: bounded, and without the fields that have no effect.

Tornado loop only; large bodies are parsed on a lane. Knows no dialect: the route gives the schema.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import copy_context
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import AliasChoices, AliasPath, BaseModel

from llmkit.gateway.access.deadlines import seconds_of
from llmkit.gateway.bodies import MAX_COUNTS, check_counts, parse_json, validated
from llmkit.gateway.forms import fields_of
from llmkit.gateway.tolerance import Tolerance
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from llmkit.gateway.access.deadlines import Deadline
    from llmkit.gateway.exchange import Exchange

__all__ = ["Admission", "Reading", "words_of"]

LARGE_BYTES = 128 << 10
TIMEOUT = "timeout"  # a field that every body may have
Schema = TypeVar("Schema", bound=BaseModel)
Message = TypeVar("Message")


# Called when a body names a model, before the route looks for it: to refuse the model to this
# caller, or to load it.
Admission = Callable[["Exchange", str], Awaitable[None]]


class Found(NamedTuple):
    """What else a body says: the fields it has, those without effect, and its time in seconds."""

    given: frozenset[str]
    ignored: list[str]
    timeout: float | None


class Reading:
    """Reads the body of an exchange; ``admissions`` are called with the model that it names."""

    def __init__(
        self, lanes: Lanes, tolerance: Tolerance, admissions: Sequence[Admission] = ()
    ) -> None:
        self._lanes, self.tolerance, self._admissions = lanes, tolerance, admissions
        self._fields: dict[str, Any] | None = None

    async def fields(self, exchange: Exchange) -> dict[str, Any]:
        """The body's fields as they came, for a route whose schema depends on them.

        ``read`` takes them from here, so a route may also rename some. Raises
        `InvalidRequestError`.
        """
        if self._fields is None:
            body = exchange.body
            if len(body) <= LARGE_BYTES:
                self._fields = _parsed(body)
            else:
                parse = partial(_parsed, body)
                self._fields = await asyncio.wrap_future(self._lanes.submit(exchange.caller, parse))
        return self._fields

    async def read(self, exchange: Exchange, schema: type[Schema]) -> Schema:
        """The body as ``schema``. Fields without effect are added to ``exchange.ignored``.

        Raises `InvalidRequestError`, which names the first invalid field, and what the admissions
        raise.
        """
        body, deadline = exchange.body, exchange.record.deadline
        if len(body) <= LARGE_BYTES:
            value, found = self._read(schema, body, deadline)
        else:
            read = partial(copy_context().run, self._read, schema, body, deadline)
            value, found = await asyncio.wrap_future(self._lanes.submit(exchange.caller, read))
        await self._take(exchange, found, value)
        return value

    async def read_form(
        self, exchange: Exchange, schema: type[Schema], lists: frozenset[str]
    ) -> Schema:
        """As ``read``, for a form with files; fields in ``lists`` hold lists. What the schema has
        as text stays as it is written, say 007."""
        body, kind = exchange.body, exchange.header("Content-Type") or ""
        deadline = exchange.record.deadline

        def read() -> tuple[Schema, Found]:
            return self._checked(schema, fields_of(kind, body, lists, words_of(schema)), deadline)

        value, found = await asyncio.wrap_future(
            self._lanes.submit(exchange.caller, partial(copy_context().run, read))
        )
        await self._take(exchange, found, value)
        return value

    async def _take(self, exchange: Exchange, found: Found, value: BaseModel) -> None:
        """What a body says beside its fields, and which model it is for."""
        exchange.ignored += found.ignored
        exchange.given = found.given
        deadline = exchange.record.deadline
        if deadline is not None and found.timeout is not None:
            deadline.shorten(found.timeout)
        model = getattr(value, "model", None)
        if isinstance(model, str) and getattr(value, "uses_model", True):
            await self.admit(exchange, model)

    async def message(self, exchange: Exchange, decode: Callable[[bytes], Message]) -> Message:
        """The body as ``decode`` reads it, as bounded as a schema's. Raises what that raises."""

        def read() -> Message:
            _parsed(body)
            return decode(body)

        body = exchange.body
        if len(body) <= LARGE_BYTES:
            return read()
        return await asyncio.wrap_future(self._lanes.submit(exchange.caller, read))

    async def aside(self, exchange: Exchange, work: Callable[[], Message]) -> Message:
        """Do what takes long on a lane, in its caller's turn. Raises what that raises."""
        return await asyncio.wrap_future(self._lanes.submit(exchange.caller, work))

    async def admit(self, exchange: Exchange, model: str) -> None:
        """A request is for a model that its body need not name. Raises what the admissions do."""
        for admit in self._admissions:
            await admit(exchange, model)

    def _read(
        self, schema: type[Schema], body: bytes, deadline: Deadline | None
    ) -> tuple[Schema, Found]:
        data, self._fields = self._fields, None
        if data is None:
            data = _parsed(body, getattr(schema, "max_counts", MAX_COUNTS))
        return self._checked(schema, data, deadline)

    def _checked(
        self, schema: type[Schema], data: dict[str, Any], deadline: Deadline | None
    ) -> tuple[Schema, Found]:
        timeout = None
        if deadline is not None and TIMEOUT in data and TIMEOUT not in schema.model_fields:
            value = data.pop(TIMEOUT)
            timeout = None if value is None else seconds_of(value, TIMEOUT)
        ignored = self.tolerance.strip(schema, data)
        given = _given(schema, data)
        return validated(schema, data), Found(given, ignored, timeout)


def _parsed(body: bytes, most: Mapping[str, int] = MAX_COUNTS) -> dict[str, Any]:
    check_counts(body, most)
    return parse_json(body)


def _given(schema: type[BaseModel], data: dict[str, Any]) -> frozenset[str]:
    """The schema's fields that have a value, and those of an object that holds the sampling."""
    fields = _fields_by_spelling(schema)
    names = {fields[key] for key, value in data.items() if value is not None and key in fields}
    for nested in names & {"options", "sampling_params"}:
        values = data.get(nested)
        if isinstance(values, dict):
            names |= {name for name, value in values.items() if value is not None}
    return frozenset(names)


@cache
def _fields_by_spelling(schema: type[BaseModel]) -> dict[str, str]:
    """A schema's fields, by their names and by what callers may call them instead."""
    return {
        spelling: name
        for name, field in schema.model_fields.items()
        for spelling in _spellings(name, field.validation_alias)
    }


@cache
def words_of(schema: type[BaseModel]) -> frozenset[str]:
    """The spellings of a schema's fields that hold text."""
    return frozenset(
        spelling
        for spelling, name in _fields_by_spelling(schema).items()
        if _is_text(schema.model_fields[name].annotation)
    )


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind is str or any(_is_text(part) for part in get_args(kind))


def _spellings(name: str, alias: str | AliasPath | AliasChoices | None) -> list[str]:
    """A field's name, and what callers may call it instead."""
    if isinstance(alias, AliasChoices):
        return [name, *(each for each in alias.choices if isinstance(each, str))]
    return [name, alias] if isinstance(alias, str) else [name]
