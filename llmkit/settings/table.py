"""One row per option: its type, range, unit and a sentence. Standard library only.

Dataclass fields carry the rows. `load`, the command line, the environment, TOML files and their
documentation are derived from them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from llmkit.errors import InvalidRequestError

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
}


@dataclass(frozen=True, slots=True)
class Option:
    """``help`` is a sentence, ``low`` and ``high`` are inclusive, ``group`` is a heading.

    A ``flag`` is True or False; a ``switch`` may also be None, "as llama.cpp decides".
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
        return str(int(value)) if self.kind == "integer" else f"{value:g}"

    @property
    def described(self) -> str:
        """One line: the sentence and the default."""
        default = "" if self.default in (None, (), False) else f" (default: {self.default})"
        return f"{self.help}{default}"

    def check(self, value: Any) -> None:
        """Raises `InvalidRequestError` naming the option."""
        wrong = self._fault(value)
        if wrong:
            raise InvalidRequestError(f"{self.name} must be {wrong}, not {value!r:.40}.", self.name)

    def _fault(self, value: Any) -> str:
        """What the value must be; empty if it is valid."""
        if value is None and self.default is None:
            return ""
        if self.kind in ("flag", "switch"):
            return "" if isinstance(value, bool) else "True or False"
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
        if self.kind == "choice":
            return "" if value in self.choices else f"one of {', '.join(self.choices)}"
        if self.kind == "layers":
            right = value == "auto" or (
                isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 10_000
            )
            return "" if right else '"auto", -1 (all) or a number of layers'
        return ""


def option(kind: Kind, default: Any, help: str, group: str = "Model", **more: Any) -> Any:
    """A dataclass field that carries its row of the table."""
    return field(
        default=default, repr=kind != "secret", metadata={"option": (kind, help, group, more)}
    )


def table(kind: type) -> dict[str, Option]:
    """The rows of a dataclass, by name."""
    found = {}
    for each in fields(kind):
        if "option" in each.metadata:
            type_, help_, group, more = each.metadata["option"]
            found[each.name] = Option(each.name, type_, each.default, help_, group, **more)
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
    for name, row in table(type(value)).items():
        row.check(getattr(value, name))
