"""From when until when a certificate is valid: the few bytes of X.509 that say so. Pure.

Python's `ssl` tells this only of certificates of others.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

__all__ = ["Validity", "read_validity"]

SEQUENCE, VERSION, UTC_TIME, LONG_TIME = 0x30, 0xA0, 0x17, 0x18
BEGIN, END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Validity:
    """The first and the last moment of a certificate."""

    since: datetime
    until: datetime


def read_validity(pem: bytes) -> Validity:
    """Of the first certificate in PEM text, the server's own. Raises `ValueError`."""
    begin = pem.index(BEGIN)
    text = pem[begin : pem.index(END, begin) + len(END)].decode("ascii")
    try:
        body, _ = _inside(ssl.PEM_cert_to_DER_cert(text), SEQUENCE)  # Certificate
        body, _ = _inside(body, SEQUENCE)  # TBSCertificate
        if body[0] == VERSION:
            body = _skip(body)
        for _ in ("serialNumber", "signature", "issuer"):
            body = _skip(body)
        validity, _ = _inside(body, SEQUENCE)
        return Validity(_time(validity), _time(_skip(validity)))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError("the certificate is damaged") from error


def _element(data: bytes) -> tuple[int, int, int]:
    """The tag of the first element, and where its content begins and ends."""
    length, start = data[1], 2
    if length & 0x80:
        many = length & 0x7F
        length, start = int.from_bytes(data[2 : 2 + many], "big"), 2 + many
    if start + length > len(data):
        raise IndexError("the element is cut off")
    return data[0], start, start + length


def _inside(data: bytes, tag: int) -> tuple[bytes, bytes]:
    found, start, end = _element(data)
    if found != tag:
        raise ValueError(f"the certificate has a {found:#x} where {tag:#x} belongs")
    return data[start:end], data[end:]


def _skip(data: bytes) -> bytes:
    return data[_element(data)[2] :]


def _time(data: bytes) -> datetime:
    tag, start, end = _element(data)
    text = data[start:end].decode("ascii")
    if tag == UTC_TIME:  # two digits of the year: 1950 to 2049
        text = ("19" if text[0] >= "5" else "20") + text
    elif tag != LONG_TIME:
        raise ValueError("the certificate has no time where one belongs")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
