"""Files within addresses: ``data:`` URLs and base64, both ways. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.media.headers import format_of

__all__ = ["as_part", "data_url", "decoded", "digest_of", "from_data_url", "is_data_url", "mime_of"]

DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
SPACES = re.compile(r"\s+")
MISSING = {"image": "(a picture that was not kept)", "audio": "(a sound that was not kept)"}
SOUNDS = {b"fLaC": "audio/flac", b"OggS": "audio/ogg", b"FORM": "audio/aiff"}


def is_data_url(text: str) -> bool:
    """Whether it is meant as one."""
    return text[:5].lower() == "data:"


def from_data_url(url: str) -> bytes:
    """The file in a ``data:`` URL. Raises `InvalidRequestError`.

    >>> from_data_url("data:text/plain;base64,aGk=")
    b'hi'
    """
    head = DATA_URL.match(url)
    if head is None:
        raise InvalidRequestError(
            "A picture or sound in an address must be a base64 data: URL.", "messages"
        )
    return decoded(url[head.end() :])


def decoded(text: str) -> bytes:
    """Base64 as bytes; lines may be broken. Raises `InvalidRequestError` for anything else."""
    for each in (text, SPACES):
        try:
            given = each if isinstance(each, str) else each.sub("", text)
            return base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            continue
    raise InvalidRequestError("A picture or sound is not valid base64.", "messages")


def data_url(data: bytes) -> str:
    """A file as an address. The opposite of `from_data_url`."""
    return f"data:{mime_of(data)};base64,{base64.b64encode(data).decode()}"


def as_part(kind: str, data: bytes | None) -> dict[str, Any]:
    """A file as a part of OpenAI's messages; words in place of one that is gone.

    >>> as_part("image", None)
    {'type': 'text', 'text': '(a picture that was not kept)'}
    """
    if data is None:
        return {"type": "text", "text": MISSING.get(kind, MISSING["image"])}
    if kind == "audio":
        form = mime_of(data).removeprefix("audio/").replace("mpeg", "mp3")
        sound = {"data": base64.b64encode(data).decode(), "format": form}
        return {"type": "input_audio", "input_audio": sound}
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def mime_of(data: bytes) -> str:
    """What kind of file it is, by its first bytes.

    >>> mime_of(b"GIF89a")
    'image/gif'
    """
    kind = format_of(data)
    if kind is not None:
        return f"image/{kind.lower()}"
    if data[:4] == b"RIFF":
        return "audio/wav"
    return SOUNDS.get(data[:4], "audio/mpeg")


def digest_of(data: bytes) -> str:
    """What a file is known by: its SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
