"""Ollama's ``keep_alive``: seconds, or a duration as Go writes it. Pure."""

from __future__ import annotations

import re

from llmkit.errors import InvalidRequestError

__all__ = ["read_keep_alive"]

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
MOST_S = 365 * 86_400.0


def read_keep_alive(value: str | int | float) -> float | None:
    """Idle seconds after which a model is unloaded; None is never, as for any negative value.

    Raises `InvalidRequestError`.

    >>> read_keep_alive("1h30m"), read_keep_alive(0), read_keep_alive(-1)
    (5400.0, 0.0, None)
    """
    seconds: float | None
    if isinstance(value, str):
        text = value.strip()
        sign = -1.0 if text.startswith("-") else 1.0
        rest = text.lstrip("+-")
        parts = PART.findall(rest)
        if re.fullmatch(r"[0-9]{1,9}", rest):
            seconds = sign * float(rest)
        elif parts and "".join(n + unit for n, unit in parts) == rest:
            seconds = sign * sum(float(n) * UNITS[unit] for n, unit in parts)
        else:
            raise InvalidRequestError(
                f'keep_alive must be seconds or a duration such as "5m", not {value!r:.40}.',
                "keep_alive",
            )
    else:
        seconds = float(value)
    if seconds < 0 or seconds > MOST_S:
        return None
    return seconds
