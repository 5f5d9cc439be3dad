"""A request body as a schema: strict JSON, strict fields, and one error that names the field.

Pure; runs on the Tornado loop or on a lane. Knows the fields of no dialect.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import re
import threading
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from llmkit.errors import InvalidRequestError
from llmkit.protocol import MAX_DEPTH, depth_of

__all__ = [
    "MAX_COUNTS",
    "SessionId",
    "Strict",
    "build_all",
    "check_counts",
    "parse",
    "parse_json",
    "validated",
]

MAX_KEYS = 5000
MAX_DIGITS = 400  # the largest double has 309
SIGNS = {"lists and objects": b"[{", "commas": b",", "fields": b":"}  # outside strings
MAX_COUNTS = {"lists and objects": 50_000, "commas": 1_000_000, "fields": 200_000}
# Also matches an unterminated string: otherwise the regex would be retried from every quote.
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
TYPE_NAMES = re.compile(r"str|int|[A-Z]\w*|.*\[.*")  # in pydantic's locations
Schema = TypeVar("Schema", bound=BaseModel)
_building = threading.Lock()


# A field of every chat: a kept conversation that it goes on with.
SessionId = Annotated[
    str | None, Field(None, validation_alias=AliasChoices("session_id", "session-id"))
]


class Strict(BaseModel):
    """Declared fields only. A null counts as absent, even for an unknown field.

    Its validator is built when it is first needed, or by `build_all`: a gateway starts faster.
    """

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Stops a list at its first error: a megabyte of bad entries makes a gigabyte of errors."""
        schema = handler(source)
        nodes: list[Any] = [schema]
        while nodes:
            node = nodes.pop()
            if isinstance(node, dict):
                if node.get("type") == "list":
                    node["fail_fast"] = True
                nodes += node.values()
            elif isinstance(node, list | tuple):
                nodes += node
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def check_counts(body: bytes, most: Mapping[str, int] = MAX_COUNTS) -> None:
    """Refuse a body that is expensive to parse: with more than ``most`` of what `SIGNS` names.

    Raises `InvalidRequestError`.

    >>> check_counts(b"[" * 100_000)
    Traceback (most recent call last):
    ...
    llmkit.errors.InvalidRequestError: The body has 100000 lists and objects; the limit is 50000.
    """
    if all(_count(body, SIGNS[name]) <= limit for name, limit in most.items()):
        return
    bare = STRINGS.sub(b"", body)
    for name, limit in most.items():
        count = _count(bare, SIGNS[name])
        if count > limit:
            raise InvalidRequestError(f"The body has {count} {name}; the limit is {limit}.")


def _count(body: bytes, signs: bytes) -> int:
    return sum(body.count(sign) for sign in signs)


def parse(schema: type[Schema], body: bytes) -> Schema:
    """A request body as its schema.

    Raises `InvalidRequestError`, which names the first invalid field.
    """
    return validated(schema, parse_json(body))


def parse_json(body: bytes) -> dict[str, Any]:
    """A request body as an object. Raises `InvalidRequestError`."""
    try:
        data = json.loads(
            body.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and depth_of(data) > MAX_DEPTH:
        raise InvalidRequestError(
            f"The body is nested too deeply; the limit is {MAX_DEPTH} levels."
        )
    if body.count(b":") > MAX_KEYS and _max_keys(data) > MAX_KEYS:
        raise InvalidRequestError(f"The body has an object with more than {MAX_KEYS} fields.")
    return data


def _max_keys(value: Any) -> int:
    """The size of the largest object in a value."""
    largest, level = 0, [value]
    while level:
        largest = max([largest, *(len(x) for x in level if isinstance(x, dict))])
        level = [
            v
            for x in level
            if isinstance(x, list | dict)
            for v in (x.values() if isinstance(x, dict) else x)
            if isinstance(v, list | dict)
        ]
    return largest


def validated(schema: type[Schema], data: dict[str, Any]) -> Schema:
    """An object as its schema. Raises like `parse`."""
    _build(schema)
    try:
        return schema.model_validate(data)
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except ValidationError as error:
        # In a union, the alternative that fits best fails deepest.
        deepest = max(
            error.errors(include_url=False, include_context=False, include_input=False),
            key=lambda e: len(e["loc"]),
        )
        raise _invalid(schema, deepest) from None


def _build(schema: type[BaseModel]) -> None:
    if not schema.__pydantic_complete__:
        with _building:  # pydantic does not expect two threads here
            schema.model_rebuild()


async def build_all() -> None:
    """Build the validators of all schemas, so that no request waits for its own.

    Gives way to the loop after each.
    """
    schemas: list[type[BaseModel]] = [Strict]
    while schemas:
        schema = schemas.pop(0)
        _build(schema)
        schemas += schema.__subclasses__()
        await asyncio.sleep(0)


def _invalid(schema: type[BaseModel], error: ErrorDetails) -> InvalidRequestError:
    is_unknown = error["type"] == "extra_forbidden"
    # The last part of an unknown field is the caller's own and may look like a type's name.
    loc = [part for part in error["loc"][:-1] if not _is_type_name(part)]
    loc += [part for part in error["loc"][-1:] if is_unknown or not _is_type_name(part)]
    param = next((part for part in loc if isinstance(part, str)), None)
    place = ".".join(map(str, loc))
    if not is_unknown:
        return InvalidRequestError(f"{place:.200}: {error['msg']}", param)
    near = (
        difflib.get_close_matches(place, schema.model_fields, n=1)
        if len(loc) == 1 and len(place) < 100
        else []
    )
    hint = f" Did you mean {near[0]}?" if near else ""
    return InvalidRequestError(f"Unrecognized or unsupported parameter: {place:.200}.{hint}", param)


def _is_type_name(part: int | str) -> bool:
    return isinstance(part, str) and TYPE_NAMES.fullmatch(part) is not None


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.30} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:  # reading an integer takes quadratic time
        raise ValueError(f"{text:.30}… is too large a number")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
