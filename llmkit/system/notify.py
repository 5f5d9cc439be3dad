"""Tells systemd how a service is: ready, reloading, stopping, alive. Standard library only.

The protocol is sd_notify(3): one datagram to ``$NOTIFY_SOCKET``. Without that variable every call
does nothing, and a message that cannot be sent never stops the service.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]

logger = logging.getLogger("llmkit")

WAIT_S = 1.0  # for a full queue of systemd; a sign of life does not wait
MAX_TEXT = 512


class Notifier:
    """What systemd hears of this process. Not thread-safe: it belongs to the main thread.

    >>> Notifier({}).ready("serving smollm2")  # not started by systemd: nothing happens
    False
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._complained = False
        self.watchdog_s = _watchdog(environment) if self._address else None

    def ready(self, status: str = "") -> bool:
        """The service serves (again, after `reloading`). Returns whether systemd was told."""
        return self._send({"READY": "1"}, status)

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        return self._send({}, text)

    def reloading(self, status: str = "reading the settings again") -> bool:
        """Settings are being read again; `ready` ends it."""
        return self._send(
            {"RELOADING": "1", "MONOTONIC_USEC": str(time.monotonic_ns() // 1000)}, status
        )

    def stopping(self, status: str = "") -> bool:
        """The service is about to end."""
        return self._send({"STOPPING": "1"}, status)

    async def watch(self) -> None:
        """Give a sign of life at half the interval that systemd wants, until cancelled.

        It runs on the event loop, so none is given when the loop no longer turns: systemd then
        restarts the service. Returns at once if systemd wants none.
        """
        if self.watchdog_s is None:
            return
        while True:
            self._send({"WATCHDOG": "1"}, wait_s=0)
            await asyncio.sleep(self.watchdog_s / 2)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, fields: Mapping[str, str], status: str = "", *, wait_s: float = WAIT_S) -> bool:
        if not self._address:
            return False
        lines = [f"{name}={value}" for name, value in fields.items()]
        if status:
            lines.append(f"STATUS={' '.join(status.split()):.{MAX_TEXT}}")
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | CLOEXEC)
            self._socket.settimeout(wait_s)
            self._socket.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning("systemd cannot be told how this service is: %s", error)
            return False
        return True


CLOEXEC = getattr(socket, "SOCK_CLOEXEC", 0)


def _address(text: str) -> str:
    """A path, or a name in the abstract namespace (``@…``); empty for anything else."""
    if not hasattr(socket, "AF_UNIX") or len(text) < 2 or text[0] not in "/@":
        if text:
            logger.warning("NOTIFY_SOCKET is not the address of a local socket: %.100s", text)
        return ""
    return "\0" + text[1:] if text[0] == "@" else text


def _watchdog(environment: Mapping[str, str]) -> float | None:
    """Within how many seconds systemd wants a sign of life; None if not from this process."""
    try:
        microseconds = int(environment["WATCHDOG_USEC"])
        pid = int(environment.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return microseconds / 1e6 if microseconds > 0 and pid == os.getpid() else None
