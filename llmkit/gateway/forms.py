"""Multipart bodies: files and fields of a form, as a body in JSON would have them. Pure.

Runs on a lane. Knows the fields of no dialect.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from email.message import Message
from typing import Any

from tornado.httputil import HTTPFile, HTTPInputError, parse_multipart_form_data

from llmkit.errors import InvalidRequestError

__all__ = ["fields_of"]

MAX_TEXT = 64 << 10
MAX_HEADER = 500  # characters of Content-Type, whose reader takes the square of its length
NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")


def fields_of(
    content_type: str, body: bytes, lists: frozenset[str], words: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a form: files as their bytes, numbers and booleans as such.

    Names may end in ``[]``; those in ``lists`` hold lists. The fields in ``words`` are text, also
    where it looks like a number. Raises `InvalidRequestError`.

    >>> form = b'--x\\r\\nContent-Disposition: form-data; name="n"\\r\\n\\r\\n3\\r\\n--x--'
    >>> fields_of("multipart/form-data; boundary=x", form, frozenset())
    {'n': 3}
    """
    if len(content_type) > MAX_HEADER:
        raise InvalidRequestError(
            f"The header Content-Type has {len(content_type)} characters; at most {MAX_HEADER}."
        )
    head = Message()
    head["Content-Type"] = content_type
    boundary = head.get_param("boundary")
    if head.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise InvalidRequestError(
            "This route takes a form: send the file as multipart/form-data, as "
            "`curl -F file=@speech.wav -F model=default` does."
        )
    texts: dict[str, list[bytes]] = {}
    files: dict[str, list[HTTPFile]] = {}
    try:
        parse_multipart_form_data(boundary.encode(), body, texts, files)
    except (HTTPInputError, ValueError) as error:
        raise InvalidRequestError(f"The form cannot be read: {error!s:.200}") from None
    found: dict[str, Any] = {}
    for given, parts in files.items():
        name = given.removesuffix("[]")
        if len(parts) > 1 or given in texts or name in found:
            raise InvalidRequestError(f"{name:.60}: one file at a time.", name[:60])
        found[name] = parts[0].body
    for given, values in texts.items():
        name = given.removesuffix("[]")
        read: list[Any] = [_text(name, value) for value in values]
        if name not in words:
            read = [_value(text) for text in read]
        if name in lists:
            found[name] = (*found.get(name, ()), *read)
        elif len(read) > 1 or name in found:
            raise InvalidRequestError(f"{name:.60} is given more than once.", name[:60])
        else:
            found[name] = read[0]
    return found


def _text(name: str, value: bytes) -> str:
    if len(value) > MAX_TEXT:
        raise InvalidRequestError(
            f"{name:.60}: {len(value)} bytes; at most {MAX_TEXT}. A file has a filename.", name[:60]
        )
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{name:.60} is not valid UTF-8.", name[:60]) from None


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text
