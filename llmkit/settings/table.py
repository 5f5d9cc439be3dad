"""One row per option: its type, range, unit and a sentence. Standard library only.

Dataclass fields carry the rows. `load`, the command line, the environment, TOML files and their
documentation are derived from them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llmkit.errors import InvalidRequestError
from llmkit.settings import values
from llmkit.settings.allowances import read_expiry, read_rate

__all__ = ["Kind", "Option", "check", "document", "option", "table"]

Kind = Literal[
    "integer",
    "number",
    "flag",
    "switch",
    "choice",
    "text",
    "path",
    "secret",
    "layers",
    "adapters",
    "shares",
    "texts",
    "origins",
    "networks",
    "globs",
    "rate",
    "url",
    "moment",
]
TYPES: Mapping[str, Any] = {
    "integer": int,
    "number": float,
    "flag": bool,
    "switch": bool,
    "text": str,
    "path": str,
    "secret": str,
    "layers": int | Literal["auto"],
    "adapters": list[str],
    "shares": str,
    "texts": list[str],
    "origins": list[str],
    "networks": list[str],
    "globs": list[str],
    "rate": str,
    "url": str,
    "moment": str,
}
LISTS = ("texts", "origins", "networks", "globs")
MAX_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Option:
    """``help`` is a sentence, ``low`` and ``high`` are inclusive, ``group`` is a heading.

    A ``flag`` is True or False; a ``switch`` may also be None, "as llama.cpp decides". ``pattern``
    and ``wanted`` say what texts are right, ``schemes`` what addresses. ``live`` options can change
    while a server runs. ``attribute`` is the field that holds the value.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    group: str
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    choices: tuple[str, ...] = ()
    pattern: str = ""
    wanted: str = ""
    schemes: tuple[str, ...] = ()
    live: bool = False
    attribute: str = ""

    @property
    def annotation(self) -> Any:
        """The type of a value that is set."""
        return Literal[self.choices] if self.kind == "choice" else TYPES[self.kind]

    @property
    def range(self) -> str:
        """The valid values, for people."""
        if self.choices:
            return ", ".join(self.choices)
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self._number(self.low)} to {self._number(self.high)}"
        return ""

    def _number(self, value: float) -> str:
        return str(int(value)) if self.kind == "integer" else f"{value:.10g}"

    @property
    def described(self) -> str:
        """One line: the sentence and the default."""
        default = "" if self.default in (None, (), "", False) else f" (default: {self.default})"
        return f"{self.help}{default}"

    def check(self, value: Any) -> None:
        """Raises `InvalidRequestError` naming the option."""
        if value is None and self.default is None:
            return
        faults = (
            (self._fault(each), each)
            for each in ([value] if self.kind not in LISTS else self._listed(value))
        )
        for wanted, wrong in faults:
            if wanted:
                given = "" if self.kind == "secret" else f", not {self.shown(wrong)}"
                raise InvalidRequestError(f"{self.name} must be {wanted}{given}.", self.name)
        if self.kind == "rate":
            read_rate(value, self.name)
        if self.kind == "moment":
            read_expiry(value, 0.0, self.name)

    def _listed(self, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise InvalidRequestError(
                f"{self.name} must be a list of texts, not {self.shown(value)}.", self.name
            )
        if len(value) > MAX_LISTED:
            raise InvalidRequestError(
                f"{self.name} may list {MAX_LISTED} at most, not {len(value)}.", self.name
            )
        return value

    def shown(self, value: Any) -> str:
        """A value for people, without what is secret in it."""
        if self.kind == "secret":
            return values.MASK
        if self.kind == "url" and isinstance(value, str):
            return repr(values.mask(value))
        return values.brief(value)

    def _fault(self, value: Any) -> str:
        """What the value must be; empty if it is valid."""
        if self.kind in ("flag", "switch"):
            return "" if isinstance(value, bool) else "true or false"
        if self.kind in ("integer", "number"):
            wanted: Any = int if self.kind == "integer" else int | float
            right = (
                isinstance(value, wanted)
                and not isinstance(value, bool)
                and self.low <= value <= self.high
            )
            return (
                ""
                if right
                else f"{'an integer' if self.kind == 'integer' else 'a number'} from {self.range}"
            )
        if self.kind == "choice" or (self.kind == "texts" and self.choices):
            return "" if value in self.choices else f"one of {', '.join(self.choices)}"
        if self.kind == "layers":
            right = value == "auto" or (
                isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 10_000
            )
            return "" if right else '"auto", -1 (all) or a number of layers'
        if self.kind == "url":
            return values.url_fault(value, self.schemes)
        if self.pattern and isinstance(value, str):
            return "" if re.fullmatch(self.pattern, value, re.A) else self.wanted
        return FAULTS[self.kind](value) if self.kind in FAULTS else ""


FAULTS: Mapping[str, Callable[[object], str]] = {
    "text": values.text_fault,
    "texts": values.text_fault,
    "path": values.text_fault,
    "rate": values.text_fault,
    "secret": values.secret_fault,
    "globs": values.glob_fault,
    "origins": values.origin_fault,
    "networks": values.network_fault,
    "moment": values.moment_fault,
}


def option(kind: Kind, default: Any, help: str, group: str = "Model", **more: Any) -> Any:
    """A dataclass field that carries its row of the table; ``key`` is its name, if another."""
    is_plain = kind not in ("secret", "url")  # an address may hold a password
    return field(default=default, repr=is_plain, metadata={"option": (kind, help, group, more)})


def table(kind: type) -> dict[str, Option]:
    """The rows of a dataclass, by name."""
    found = {}
    for each in fields(kind):
        if "option" in each.metadata:
            type_, help_, group, more = each.metadata["option"]
            name = more.get("key", each.name)
            more = {k: v for k, v in more.items() if k != "key"} | {"attribute": each.name}
            found[name] = Option(name, type_, each.default, help_, group, **more)
    return found


def document(
    function: Callable[..., Any], rows: Mapping[str, Option], kinds: Mapping[str, Any]
) -> None:
    """Document the ``**options`` of a function: names, types and sentences.

    They go into its signature, for completion, and into its docstring in place of ``{options}``.
    """
    signature = inspect.signature(function)
    named = [
        p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    more = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=row.default, annotation=kinds[name]
        )
        for name, row in rows.items()
    ]
    function.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
    lines: list[str] = []
    for group in dict.fromkeys(row.group for row in rows.values()):
        lines.append(f"{group}:")
        lines += [
            f"    {name}: {row.described}" for name, row in rows.items() if row.group == group
        ]
    function.__doc__ = (function.__doc__ or "").replace("{options}", "\n    ".join(lines))


def check(value: Any) -> None:
    """Check every option of a dataclass. Raises `InvalidRequestError`."""
    for row in table(type(value)).values():
        row.check(getattr(value, row.attribute))
