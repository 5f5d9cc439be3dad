"""Values as other services write them, turned into ours. Pure.

Each function takes a text, or a value of TOML, and raises `ValueError` with what it must be.
"""

from __future__ import annotations

import re
from typing import Any

from llmkit.settings.values import WORDS

__all__ = [
    "as_context",
    "as_flag",
    "as_integer",
    "as_list",
    "as_log_format",
    "as_log_level",
    "as_number",
    "as_rate",
    "as_seconds",
    "as_slots",
    "as_weights",
    "collector_note",
    "slots_note",
]

SPANS = {1: "second", 60: "minute", 3600: "hour", 86_400: "day"}
LEVELS = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning"}
LEVELS |= {"warning": "warning", "error": "error", "off": "error"}
# Of mistral.rs's in-situ quantization; those that are called so here too are not listed.
WEIGHTS = {"Q2K": "Q2_K", "Q2_K": "Q2_K", "Q3K": "Q3_K_M", "Q3_K": "Q3_K_M", "Q4K": "Q4_K_M"}
WEIGHTS |= {"Q4_K": "Q4_K_M", "Q5K": "Q5_K_M", "Q5_K": "Q5_K_M", "Q6K": "Q6_K", "Q6_K": "Q6_K"}
WEIGHTS |= {"Q4": "Q4_K_M", "4": "Q4_K_M", "Q5": "Q5_K_M", "5": "Q5_K_M", "Q6": "Q6_K"}
WEIGHTS |= {"6": "Q6_K", "Q8": "Q8_0", "8": "Q8_0", "3": "Q3_K_M", "2": "Q2_K"}
SAME = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "F16", "BF16", "IQ4_XS", "IQ4_NL",
)  # fmt: skip
GRPC_PORT = 4317
MAX_SLOTS = 256


def as_flag(value: Any) -> bool:
    """True or false, in whatever spelling.

    >>> as_flag("1"), as_flag("False")
    (True, False)
    """
    if isinstance(value, bool):
        return value
    try:
        return WORDS[str(value).strip().lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def as_integer(value: Any) -> int:
    """An integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().replace("_", "")
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.A) is None:
        raise ValueError("must be an integer")
    return int(text)


def as_context(value: Any) -> int | None:
    """Tokens of context; None for 0, by which others mean the model's own."""
    return as_integer(value) or None


def as_slots(value: Any) -> int:
    """Requests at once, as many as there can be slots."""
    return min(as_integer(value), MAX_SLOTS)


def slots_note(value: Any) -> str:
    """What is to be said of `as_slots`; empty if nothing. So it is with the other ``…_note``."""
    return f"{MAX_SLOTS} is the most there can be" if as_integer(value) > MAX_SLOTS else ""


def as_log_format(value: Any) -> str:
    """A format of the log; what others call their readable ones is ours."""
    name = str(value).strip().lower()
    return "pretty" if name in ("text", "plain", "compact", "full") else name


def as_number(value: Any) -> float:
    """A number."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("must be a number") from None


def as_list(value: Any) -> list[str]:
    """A list of texts, separated by commas.

    >>> as_list("a, b,")
    ['a', 'b']
    """
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return [text for part in parts if (text := str(part).strip())]


def as_seconds(value: Any) -> int:
    """A span in seconds, with or without its unit.

    >>> as_seconds("60"), as_seconds("5m")
    (60, 300)
    """
    match = re.fullmatch(r"([0-9]{1,9})\s*(s|m|h|d|)", str(value).strip().lower(), re.A)
    if match is None or not int(match[1]):
        raise ValueError("must be a number of seconds, from 1")
    return int(match[1]) * {"m": 60, "h": 3600, "d": 86_400}.get(match[2], 1)


def as_rate(requests: Any, seconds: int = 60) -> str | None:
    """So many requests in a window of seconds, as a rate of ours; None for 0, which is no limit.

    >>> as_rate("100"), as_rate(10, 90), as_rate(0)
    ('100/minute', '10/90s', None)
    """
    amount = as_integer(requests)
    if amount < 0:
        raise ValueError("must be a number of requests, or 0 for no limit")
    return None if not amount else f"{amount}/{SPANS.get(seconds, f'{seconds}s')}"


def as_log_level(value: Any) -> str:
    """The general level of a RUST_LOG, whose other parts are of modules that are not here.

    >>> as_log_level("server=trace,warn")
    'warning'
    """
    general = [part for part in as_list(value) if "=" not in part]
    level = LEVELS.get(general[-1].lower()) if general else None
    if level is None:
        raise ValueError("must have a level for all: trace, debug, info, warn or error")
    return level


def as_weights(value: Any) -> str:
    """The type of weights that is nearest to one of in-situ quantization.

    >>> as_weights("q4k"), as_weights(8)
    ('Q4_K_M', 'Q8_0')
    """
    name = str(value).strip().upper()
    if name in SAME:
        return name
    if name not in WEIGHTS:
        raise ValueError(
            "must be a type of weights that a GGUF file can have, such as Q4_K, Q5_K, Q6_K or Q8_0"
        )
    return WEIGHTS[name]


def collector_note(address: str) -> str:
    """About a collector's address."""
    if re.search(rf":{GRPC_PORT}(?:/|$)", address.strip()) is None:
        return ""
    return (
        f"port {GRPC_PORT} is usually for gRPC, and this server exports over HTTP: a collector "
        "listens for that on port 4318"
    )
