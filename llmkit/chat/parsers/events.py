"""What a model's text parses into: content, reasoning and tool calls. Pure."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "Call",
    "Content",
    "Event",
    "Parser",
    "Plain",
    "Reasoning",
    "as_call",
    "fits",
    "held",
    "loads",
]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text in which the model reasons."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


CHECK_S = 0.1  # time limit for validating one call
Event = Content | Reasoning | Call


class Parser(Protocol):
    """Parses text as it streams; what it cannot parse is content, never an error."""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends within reasoning."""
        ...

    def push(self, text: str) -> list[Event]:
        """The events certain so far."""
        ...

    def finish(self) -> list[Event]:
        """The remaining events, at the end of the text."""
        ...


class Plain:
    """All text is content."""

    thinking = False

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def held(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may begin ``tag``.

    >>> held("a <tool", "<tool_call>")
    5
    """
    return next(
        (n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0
    )


def loads(text: str) -> Any:
    """JSON from a model; None if it is invalid, has non-JSON numbers, or nests too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def as_call(value: Any, tools: dict[str, Any]) -> Call | None:
    """The value (JSON text, or parsed) as a call, if it names one of the tools and fits its schema.

    ``tools`` maps names to the JSON schemas of their arguments.
    """
    value = loads(value) if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = loads(arguments) if isinstance(arguments, str) else arguments
    try:
        if not (isinstance(arguments, dict) and fits(arguments, tools[name])):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def fits(arguments: Any, schema: Any) -> bool:
    """Whether arguments are valid under a schema; True if that cannot be decided in time.

    Patterns are left to the grammar: Python's regular expressions never finish on some.
    """
    if not isinstance(schema, dict) or not schema:
        return True
    import jsonschema  # type: ignore[import-untyped]
    import referencing

    end = time.monotonic() + CHECK_S

    def counted(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def run(*args: Any) -> Iterator[Any]:
            if time.monotonic() > end:
                raise TimeoutError("multiplying references, for example")
            yield from check(*args) or ()

        return run

    try:
        if "patternProperties" in json.dumps(schema):
            return True
        checks = {
            name: counted(check)
            for name, check in jsonschema.Draft202012Validator.VALIDATORS.items()
        }
        checks |= dict.fromkeys(("pattern", "uniqueItems"), _anything)
        kind = jsonschema.validators.extend(jsonschema.Draft202012Validator, checks)
        return bool(kind(schema, registry=referencing.Registry()).is_valid(arguments))
    except Exception:  # an invalid schema, an external reference, or a timeout
        return True


def _anything(*_: Any) -> Iterator[Any]:
    return iter(())
