"""The sandbox's own filters: transformers' ``tojson`` and ``from_json``, and bounded jinja2 ones.

Replaced are those of jinja2's filters whose result must be measured before it is built. Pure; any
thread, on the budget of the rendering in progress. Knows nothing of environments or templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llmkit.chat.bounds import MAX_ITEMS, current_budget, refuse

__all__ = ["OWN_FILTERS"]

MAX_PRECISION, MAX_NUMERAL, MAX_PAD = 20, 1000, 16


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    budget = current_budget()
    size, depth = budget.measure(value)
    if isinstance(indent, str):
        indent = indent[:MAX_PAD]
    elif indent is not None:
        indent = max(0, min(int(indent), MAX_PAD))
    if separators and any(len(str(separator)) > MAX_PAD for separator in separators):
        refuse("tojson: the separators are too long")
    if isinstance(value, list | tuple | dict | str):
        pad = len(indent) if isinstance(indent, str) else indent or 0
        budget.reserve(budget.length(value) + size * depth * pad // 4)
    try:
        return json.dumps(
            value,
            ensure_ascii=bool(ensure_ascii),
            indent=indent,
            separators=tuple(separators) if separators else None,
            sort_keys=bool(sort_keys),
        )
    except (TypeError, ValueError) as error:
        return str(refuse(f"tojson: {error}"))


def _from_json(value: Any) -> Any:
    return json.loads(str(value))


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> Any:
    numbers = [
        entry.get(attribute) if attribute is not None and isinstance(entry, dict) else entry
        for entry in value
    ]
    if not all(isinstance(n, int | float) for n in (start, *numbers)):
        refuse("sum takes only numbers")
    return sum(numbers, start)  # type: ignore[arg-type]


def _round(value: Any, precision: Any = 0, method: str = "common") -> Any:
    from jinja2.filters import do_round

    if abs(int(precision)) > MAX_PRECISION:
        refuse(f"round: precision is limited to {MAX_PRECISION}")
    return do_round(value, int(precision), method)  # type: ignore[arg-type]


def _float(value: Any, default: float = 0.0) -> float:
    from jinja2.filters import do_float

    return (
        default if isinstance(value, str) and len(value) > MAX_NUMERAL else do_float(value, default)
    )


def _trim(value: Any, chars: Any = None) -> str:
    budget = current_budget()
    budget.check_strip([chars])
    return str(budget.text(value)).strip(chars)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    budget = current_budget()
    text = budget.text(value)
    pad = width[:64] if isinstance(width, str) else " " * max(0, min(int(width), 64))
    budget.reserve(len(text) + len(pad) * (text.count("\n") + 1))
    lines = text.split("\n")
    if len(lines) > MAX_ITEMS:
        refuse("the template builds too long a list")
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *rest])


def _join(value: Any, d: str = "", attribute: Any = None) -> str:
    budget = current_budget()
    entries = budget.listed(value)
    if attribute is not None:
        entries = [entry.get(attribute, "") if isinstance(entry, dict) else "" for entry in entries]
    separator = str(budget.text(d))
    return separator.join(budget.texts(list(entries), extra=len(separator)))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = current_budget()
    text, old, new = str(budget.text(value)), budget.text(old), budget.text(new)
    budget.check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else int(count))


def _string(value: Any) -> Any:
    return current_budget().text(value)


OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "indent": _indent,
    "tojson": _tojson,
    "join": _join,
    "replace": _replace,
    "from_json": _from_json,
    "sum": _sum,
    "round": _round,
    "float": _float,
    "trim": _trim,
    "string": _string,
}
