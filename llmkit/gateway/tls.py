"""TLS from files: checked at the start, and read again when they change. One thread at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

from llmkit.errors import InvalidRequestError
from llmkit.gateway.certificates import Validity, read_validity
from llmkit.system.files import open_plain

__all__ = ["Certificates"]

logger = logging.getLogger("llmkit.gateway")

MAX_FILE_BYTES = 1 << 20
DAY = timedelta(days=1)
Seen = tuple[tuple[int, int, int, int, int], ...]


class Certificates:
    """A certificate with its chain, and its private key, as PEM files.

    ``context`` is for new connections. Raises `InvalidRequestError` naming the option if the files
    cannot be read, do not fit together, or if everyone may read the key.
    """

    def __init__(self, cert: str | Path, key: str | Path) -> None:
        self._cert, self._key = Path(cert), Path(key)
        self._seen = self._look()
        self.context, self._validity = self._load()
        self._say_validity(datetime.now(UTC))
        self._bad: Seen | None = None  # files that were tried and do not fit

    def _look(self) -> Seen:
        """What changes when a file does."""
        found = []
        for path in (self._cert, self._key):
            try:
                s = path.stat()
                # ctime for its mode: who was told to run chmod need do nothing else. mtime for
                # Windows, where ctime is when it was made.
                found.append((s.st_dev, s.st_ino, s.st_ctime_ns, s.st_mtime_ns, s.st_size))
            except OSError:
                found.append((0, 0, 0, 0, 0))
        return tuple(found)

    def _load(self) -> tuple[ssl.SSLContext, Validity]:
        pem = _read(self._cert, "tls_cert")
        key = _read(self._key, "tls_key", is_secret=True)
        if b"-----BEGIN CERTIFICATE-----" not in pem:
            raise InvalidRequestError(
                f"tls_cert: {self._cert} holds no certificate in PEM form.", "tls_cert"
            )
        if b"PRIVATE KEY-----" not in key:
            raise InvalidRequestError(
                f"tls_key: {self._key} holds no private key in PEM form.", "tls_key"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_refuse_password)
            return context, read_validity(pem)
        except ssl.SSLError as error:
            raise InvalidRequestError(self._why(error), "tls_cert") from None
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"tls_cert: {self._cert} and {self._key} cannot be used: {error}", "tls_cert"
            ) from None

    def _why(self, error: ssl.SSLError) -> str:
        if error.reason == "KEY_VALUES_MISMATCH":
            return (
                f"the certificate {self._cert} was not made for the key {self._key}; "
                "give the two that belong together."
            )
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return (
            f"tls_cert: {self._cert} and {self._key} cannot be used ({reason}); "
            "they must be a certificate with its chain and its key, both as PEM."
        )

    def refresh(self, now: datetime | None = None) -> bool:
        """Load the files again if they changed; True if ``context`` is a new one.

        Files that cannot be used leave the old certificate in use. That is said if they still
        cannot at the next look: often one of the two is written a moment before the other. Of a
        certificate that ends soon is told once a day.
        """
        is_new = self._reload()
        now = now or datetime.now(UTC)
        if is_new or abs(now - self._said_at) >= DAY:
            self._say_validity(now)
        return is_new

    def _reload(self) -> bool:
        seen = self._look()
        if seen == self._seen:
            self._bad = None
            return False
        try:
            self.context, self._validity = self._load()
        except InvalidRequestError as error:
            if self._bad == seen:
                self._seen = seen
                logger.error("the old certificate stays in use: %s", error)
            self._bad = seen
            return False
        self._seen, self._bad = seen, None
        logger.info("a new certificate is in use, valid until %s", self._validity.until)
        return True

    def _say_validity(self, now: datetime) -> None:
        self._said_at = now
        _say_validity(self._validity, now)


def _read(path: Path, param: str, *, is_secret: bool = False) -> bytes:
    try:
        with open_plain(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidRequestError(f"{param}: {path} cannot be read: {reason}.", param) from None
    if is_secret and os.name == "posix" and mode & 0o007:
        raise InvalidRequestError(
            f"{param}: everyone on this machine may read or change the private key {path}; "
            f"run `chmod 600 {path}` first.",
            param,
        )
    return data


def _refuse_password() -> str:
    """Called for an encrypted key; OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted; decrypt it with `openssl pkey` into a file of yours")


def _say_validity(validity: Validity, now: datetime) -> None:
    if now >= validity.until:
        logger.warning("the certificate has expired, on %s; clients will refuse it", validity.until)
    elif now < validity.since:
        logger.warning("the certificate is only valid from %s on", validity.since)
    else:
        with contextlib.suppress(OverflowError):
            days = (validity.until - now).days
            if days < 7:
                logger.warning("the certificate expires in %d days, on %s", days, validity.until)
