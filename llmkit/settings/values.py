"""What values of each kind look like: checked, read from text, shown without secrets. Pure."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from datetime import date
from typing import Any
from urllib.parse import urlsplit

from llmkit.errors import InvalidRequestError
from llmkit.settings.allowances import SPAN

__all__ = [
    "MASK",
    "ORIGIN",
    "brief",
    "check_tokens",
    "from_text",
    "glob_fault",
    "mask",
    "masked",
    "moment_fault",
    "network_fault",
    "origin_fault",
    "secret_fault",
    "text_fault",
    "url_fault",
]

MAX_TEXT, MAX_GLOB, MAX_SECRET = 4096, 200, 512
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)"
    r"(:(?P<port>[0-9]{1,5}))?",
    re.A,
)
PASSWORD = re.compile(r"(?<=://)([^:@/?#]*):.*@", re.S)
# Redis has users since version 6: what stands alone before @ may be meant as the password. And
# passwords of any letters are often put there as they are.
REDIS = re.compile(r"\b((?:redis|valkey)s?(?:\+\w+)?|unix)://(?:([^\s:@/?#]*):)?\S*@", re.I)
PARAMETER = re.compile(r"([?&][^=&]*(?:pass|secret|token|key)[^=&]*=)[^&#]*", re.I)
WORDS = {"true": True, "yes": True, "on": True, "1": True}
WORDS |= {"false": False, "no": False, "off": False, "0": False}
MASK = "***"


def text_fault(value: object) -> str:
    """What a text must be; empty if this is one. So it is with the other ``…_fault``."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        return "a text"
    if not text.strip():
        return "a text that is not empty"
    if len(text) > MAX_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in text):
        return f"a text of one line and at most {MAX_TEXT} characters"
    return ""


def secret_fault(value: object) -> str:
    """Of a secret, which travels in headers."""
    right = (
        isinstance(value, str)
        and value == value.strip() != ""
        and len(value) <= MAX_SECRET
        and value.isascii()
        and value.isprintable()
    )
    wanted = f"printable ASCII of 1 to {MAX_SECRET} characters, without spaces around it"
    return "" if right else wanted


def glob_fault(value: object) -> str:
    """Of a model's name, or a pattern of names."""
    if not text_fault(value) and isinstance(value, str) and len(value) <= MAX_GLOB:
        return ""
    return f"names of models or globs such as qwen*, of at most {MAX_GLOB} characters"


def origin_fault(value: object) -> str:
    """Of what browsers send as Origin; ``*`` is all of them."""
    match = ORIGIN.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if value == "*" or (match is not None and int(match["port"] or 1) in range(1, 65536)):
        return ""
    return (
        "origins such as https://chat.example.org, without a path or a slash at the end, "
        "or * for every website"
    )


def network_fault(value: object) -> str:
    """Of an address, or a network as CIDR."""
    wanted = "addresses or networks, such as 10.0.0.1 or 10.0.0.0/8"
    if not isinstance(value, str):
        return wanted
    try:
        ipaddress.ip_network(value.strip())
        return ""
    except ValueError as error:
        if "host bits" not in str(error):
            return wanted
        near = ipaddress.ip_network(value.strip(), strict=False)
        return f"{wanted} (did you mean {near}?)"


def url_fault(value: object, schemes: tuple[str, ...]) -> str:
    """Of an address with one of these schemes. Whether its place exists is not looked at."""
    wanted = f"an address that begins with {' or '.join(f'{s}://' for s in schemes)}"
    if not isinstance(value, str) or text_fault(value) or value != value.strip():
        return wanted
    try:
        parts = urlsplit(value)
        is_address = "://" in value and parts.scheme in schemes
        port = parts.port
    except ValueError:
        return f"{wanted} and has a valid host and port"
    if not is_address:
        return wanted
    if parts.scheme not in ("sqlite", "unix") and (not parts.hostname or port == 0):
        return f"{wanted}, followed by a host"
    return ""


def moment_fault(value: object) -> str:
    """Of the end of something: a date or a time. Not a span, which would begin again and again."""
    wanted = "a date (2027-01-31) or a time (2027-01-31T12:00:00+01:00)"
    if isinstance(value, str) and SPAN.fullmatch(value.strip().lower()):
        return f"{wanted}; a span would begin again with each start"
    return "" if isinstance(value, str | date) else wanted


def from_text(text: str, kind: str) -> Any:
    """The value that stands in the environment or on the command line.

    What cannot be read comes back as it is: the check of the option says what is right.

    >>> from_text("8080", "integer"), from_text("on", "flag"), from_text("a, b", "texts")
    (8080, True, ['a', 'b'])
    """
    text = text.strip()
    try:
        if kind == "integer" or (kind == "layers" and text != "auto"):
            return int(text)
        if kind == "number":
            return float(text)
        if kind in ("flag", "switch"):
            return WORDS[text.lower()]
        if kind in ("texts", "globs", "origins", "networks", "adapters"):
            if text.startswith(("[", "{")):
                return json.loads(text)
            return [part for each in text.split(",") if (part := each.strip())]
    except (ValueError, KeyError, RecursionError):
        pass
    return text


def mask(address: str) -> str:
    """An address without its password.

    >>> mask("postgresql://ann:secret@host/db")
    'postgresql://ann:***@host/db'
    """
    return masked(address) if "://" in address else MASK


def masked(text: str) -> str:
    """A text without the passwords of addresses in it.

    >>> masked("connection refused: /v1/traces?api_key=secret")
    'connection refused: /v1/traces?api_key=***'
    """
    text = PARAMETER.sub(rf"\1{MASK}", text)  # first: there may be an @ in it
    text = REDIS.sub(lambda m: f"{m[1]}://{'' if m[2] is None else m[2] + ':'}{MASK}@", text)
    return PASSWORD.sub(rf"\1:{MASK}@", text)


def has_password(address: str) -> bool:
    """Whether a part of an address that is for a password is there.

    >>> has_password("redis://:secret@host"), has_password("redis://limiter@host")
    (True, False)
    """
    return bool(PASSWORD.search(address) or PARAMETER.search(address))


def brief(value: object, most: int = 60) -> str:
    """A value for a message, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integers of thousands of digits
        return "so large a number"
    return text if len(text) <= most else text[: most - 1] + "…"


def check_tokens(default: int | None, limit: int | None) -> None:
    """Check that the default length of answers is within the limit.

    Raises `InvalidRequestError`.
    """
    if default is not None and limit is not None and default > limit:
        raise InvalidRequestError(
            f"default_max_tokens must be at most max_tokens_limit ({limit}), not {default}.",
            "default_max_tokens",
        )
