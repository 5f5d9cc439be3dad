"""The fleet's key: a file that gateways and engines have, and the keys that are made from it."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

import zmq
from zmq.utils import z85

from llmkit.bridge.curve import CurveKeys
from llmkit.errors import InvalidRequestError
from llmkit.system.files import open_plain

__all__ = ["engine_keys", "gateway_keys", "make_key", "read_key"]

MIN_BYTES, MAX_BYTES = 32, 4096
SETTING = "fleet_key_file"


def make_key(path: Path) -> None:
    """Write a new key, readable by its owner only. Raises `OSError`, also if there is a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


def read_key(path: Path) -> bytes:
    """The key in a file. Raises `InvalidRequestError` if it cannot be one, or is not secret.

    A file of another owner (a secret that Kubernetes or systemd mounts) may be readable by its
    group: that is how we can read it.
    """
    try:
        with open_plain(path) as file:
            status = os.fstat(file.fileno())
            key = file.read(MAX_BYTES + 1).strip()
    except OSError as error:
        raise InvalidRequestError(
            f"the fleet key {path} cannot be read: {error.strerror or error}. "
            f"`llmkit keys fleet {path}` makes one; copy it to all hosts of the fleet.",
            SETTING,
        ) from None
    if hasattr(os, "getuid"):
        others = 0o077 if status.st_uid == os.getuid() else 0o027
        if stat.S_IMODE(status.st_mode) & others:
            raise InvalidRequestError(
                f"the fleet key {path} is not secret: others may read or write it "
                f"(mode {stat.S_IMODE(status.st_mode):04o}). chmod 600 {path}",
                SETTING,
            )
    if not MIN_BYTES <= len(key) <= MAX_BYTES:
        raise InvalidRequestError(
            f"the fleet key {path} has {len(key)} bytes; {MIN_BYTES} to {MAX_BYTES} are wanted. "
            f"`llmkit keys fleet FILE` makes one.",
            SETTING,
        )
    return key


def gateway_keys(key: bytes) -> CurveKeys:
    """What a gateway of the fleet connects and listens with."""
    return CurveKeys(*_pair(key, b"gateway"), _pair(key, b"engine")[0])


def engine_keys(key: bytes) -> CurveKeys:
    """What an engine of the fleet connects and listens with."""
    return CurveKeys(*_pair(key, b"engine"), _pair(key, b"gateway")[0])


def _pair(key: bytes, side: bytes) -> tuple[bytes, bytes]:
    """A CURVE pair, public and secret. Any 32 bytes are a secret key of Curve25519.

    The file's key is random, so that one hash is enough: there are no passwords to guess.
    """
    folded = hashlib.sha256(key).digest()
    secret = hashlib.blake2b(key=folded, digest_size=32, person=b"llmkit fleet 1", salt=side)
    text = z85.encode(secret.digest())
    return zmq.curve_public(text), text
