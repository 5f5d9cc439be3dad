"""What a model's text turns out to be: content, reasoning, calls of tools. Pure."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Call", "Content", "Event", "Parser", "Plain", "Reasoning", "as_call", "fits", "held", "loads"]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model writes for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


CHECK_S = 0.1  # for checking one call
Event = Content | Reasoning | Call


class Parser(Protocol):
    """Reads text as it comes; what it cannot read is content, never an error."""

    @property
    def thinking(self) -> bool:
        """Whether the text is within reasoning."""
        ...

    def push(self, text: str) -> list[Event]:
        """What the text so far is for sure."""
        ...

    def finish(self) -> list[Event]:
        """The rest, when no more text comes."""
        ...


class Plain:
    """All text is content."""

    thinking = False

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def held(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``.

    >>> held("a <tool", "<tool_call>")
    5
    """
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


def loads(text: str) -> Any:
    """JSON as a model wrote it; None for what is none, for numbers that JSON does not have, and for what is nested without end."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def as_call(value: Any, tools: dict[str, Any]) -> Call | None:
    """A call of one of the tools (by name, with the JSON schemas of their arguments), if it is one and fits: JSON as text, or parsed."""
    value = loads(value) if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = loads(arguments) if isinstance(arguments, str) else arguments
    try:
        fine = isinstance(arguments, dict) and fits(arguments, tools[name])
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)) if fine else None
    except (ValueError, RecursionError):
        return None


def fits(arguments: Any, schema: Any) -> bool:
    """Whether arguments are valid under a schema; True where that cannot be told, or not soon. Patterns are left to the grammar: Python's never end on some."""
    if not isinstance(schema, dict) or not schema:
        return True
    import jsonschema  # type: ignore[import-untyped]
    import referencing

    end = time.monotonic() + CHECK_S

    def counted(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def run(*args: Any) -> Iterator[Any]:
            if time.monotonic() > end:
                raise TimeoutError("references that multiply, say")
            yield from check(*args) or ()

        return run

    try:
        if "patternProperties" in json.dumps(schema):
            return True
        checks = {name: counted(check) for name, check in jsonschema.Draft202012Validator.VALIDATORS.items()}
        checks |= dict.fromkeys(("pattern", "uniqueItems"), _anything)
        kind = jsonschema.validators.extend(jsonschema.Draft202012Validator, checks)
        return bool(kind(schema, registry=referencing.Registry()).is_valid(arguments))
    except Exception:  # a schema that is none, refers to what is elsewhere, or takes too long
        return True


def _anything(*_: Any) -> Iterator[Any]:
    return iter(())
