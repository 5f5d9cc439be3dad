"""How limits of callers are written: rates, ends of validity, names. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from llmkit.errors import InvalidRequestError

__all__ = ["Rate", "check_name", "read_expiry", "read_rate"]

SECONDS = {"s": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
SECONDS |= {"d": 86_400, "day": 86_400, "w": 604_800, "week": 604_800}
UNIT = r"(?P<unit>[a-z]{1,7})"
RATE = re.compile(rf"(?P<amount>[0-9]{{1,9}})\s*(?:/|per)\s*(?P<many>[0-9]{{1,6}})?\s*{UNIT}", re.A)
SPAN = re.compile(rf"(?P<amount>[0-9]{{1,6}})\s*{UNIT}", re.A)
MAX_WINDOW_S = 31 * 86_400
NAME = re.compile(r"[^\W_][\w.@+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``amount`` requests in any ``seconds``."""

    amount: int
    seconds: int


def read_rate(text: str, param: str = "rate") -> Rate:
    """A rate such as "60/minute", "5/s" or "1000/12h". Raises `InvalidRequestError`.

    >>> read_rate("60/minute")
    Rate(amount=60, seconds=60)
    """
    match = RATE.fullmatch(text.strip().lower())
    unit = _unit(match["unit"]) if match else None
    if match is None or unit is None:
        raise InvalidRequestError(
            f'{param} must be requests for each span, such as "60/minute" or "1000/12h", '
            f"not {text!r:.60}.",
            param,
        )
    amount, seconds = int(match["amount"]), unit * int(match["many"] or 1)
    if not amount:
        raise InvalidRequestError(
            f"{param} must allow at least one request, not {text!r:.60}; "
            "to keep a caller out, revoke its key or set enabled = false.",
            param,
        )
    if not 1 <= seconds <= MAX_WINDOW_S:
        raise InvalidRequestError(
            f"the span of {param} must be from 1 second to 31 days, not {text!r:.60}.", param
        )
    return Rate(amount, seconds)


def _unit(word: str) -> int | None:
    return SECONDS.get(word) or SECONDS.get(word.removesuffix("s"))


def read_expiry(value: str | date | None, now: float, param: str = "expires") -> float | None:
    """When a key ends, in seconds since the epoch: a date (its end, UTC), a time, or a span.

    A time without a zone is UTC. Raises `InvalidRequestError`.

    >>> read_expiry("90d", 0.0)
    7776000.0
    """
    if value is None:
        return None
    text = value.isoformat() if isinstance(value, date) else str(value).strip()
    span = SPAN.fullmatch(text.lower())
    unit = _unit(span["unit"]) if span else None
    if span is not None and unit is not None and int(span["amount"]):
        return now + int(span["amount"]) * unit
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.A):
            return (_utc(datetime.fromisoformat(text)) + timedelta(days=1)).timestamp()
        if "-" not in text:
            raise ValueError(text)
        return _utc(datetime.fromisoformat(text)).timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequestError(
            f"{param} must be a date (2027-01-31), a time (2027-01-31T12:00:00+01:00) or a span "
            f"(90d), not {text!r:.60}.",
            param,
        ) from None


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def check_name(name: str, param: str = "name") -> None:
    """The name of a key: it stands in logs and tables. Raises `InvalidRequestError`."""
    if NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"the name of a key must be 1 to 64 letters, digits or any of _ . @ + -, and begin "
            f"with a letter or digit, not {name!r:.80}.",
            param,
        )
