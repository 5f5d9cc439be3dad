"""The connection file: how a running engine is found without running any code in its kernel.

It lies in `jupyter_runtime_dir()` with mode 0600 and says who serves which model at which address.
Readers trust it only when owner and mode are right and the process that wrote it still runs. Home
directories are often shared between hosts, so the file also says where its process id is valid.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmkit.protocol import ModelDescription, Origin
from llmkit.system.files import open_plain, shallow_json
from llmkit.system.process import Life, life_of, process_start_time

__all__ = [
    "Connection",
    "find_connections",
    "known",
    "make_connection",
    "read",
    "remove",
    "runtime_dir",
    "write",
]

PREFIX, SUFFIX = "llmkit-", ".json"
VERSION = 2
LOOPBACK = re.compile(r"tcp://127\.0\.0\.1:[0-9]{1,5}")
MAX_FILE_BYTES = 1 << 20
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Connection:
    """A running engine, as described by its connection file."""

    address: str
    key: str = field(repr=False)
    pid: int
    start_time: float
    host: str
    boot_id: str
    pid_namespace: str
    kernel_id: str | None
    created: float
    model: ModelDescription
    server_key: str = field(default="", repr=False)  # CURVE's, for TCP addresses
    path: Path = field(default=Path(), compare=False)

    @property
    def origin(self) -> Origin:
        return Origin(
            "process" if self.kernel_id is None else "kernel",
            self.pid,
            self.kernel_id,
            self.host,
            shared=self.path != Path(),
        )

    @property
    def is_here(self) -> bool:
        """Whether the process id means anything on this machine."""
        return (self.host, self.boot_id, self.pid_namespace) == _place()

    @property
    def life(self) -> Life:
        """What has become of the process that wrote the file; "gone" only when that is certain."""
        return life_of(self.pid, self.start_time) if self.is_here else "gone"

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote the file still runs. True when in doubt."""
        return self.life != "gone"


def runtime_dir() -> Path:
    from jupyter_core.paths import jupyter_runtime_dir

    return Path(jupyter_runtime_dir())


def _place() -> tuple[str, str, str]:
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return (
        os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", ""),
        boot,
        namespace,
    )


def make_connection(
    model: ModelDescription,
    kernel_id: str | None,
    created: float,
    *,
    tcp: bool = sys.platform == "win32",
) -> Connection:
    """A connection for an engine in this process, with a fresh key.

    The address is a socket in a private directory on local disk (paths are limited to 107 bytes).
    With ``tcp``, for systems without such sockets, it is a loopback port chosen by binding.
    """
    start = process_start_time(os.getpid())
    host, boot, namespace = _place()
    address = (
        "tcp://127.0.0.1:*"
        if tcp
        else f"ipc://{tempfile.mkdtemp(prefix=PREFIX, dir=_socket_root())}/s"
    )
    return Connection(
        address,
        secrets.token_hex(32),
        os.getpid(),
        start or 0.0,
        host,
        boot,
        namespace,
        kernel_id,
        created,
        model,
    )


def _socket_root() -> str:
    """A short local directory, the user's own if there is one."""
    root = os.environ.get("XDG_RUNTIME_DIR", "")
    if root and len(root) < 60 and os.access(root, os.W_OK) and os.stat(root).st_uid == os.getuid():
        return root
    for root in (tempfile.gettempdir(), "/tmp"):
        if len(root) < 70 and os.access(root, os.W_OK):
            return root
    return tempfile.gettempdir()


def write(connection: Connection) -> Path:
    """Write the file, readable by its owner only. Returns its path."""
    from jupyter_core.paths import secure_write

    folder = runtime_dir()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{PREFIX}{connection.pid}-{secrets.token_hex(4)}{SUFFIX}"
    data = asdict(connection)
    del data["path"]
    hidden = path.with_name("." + path.name)  # renamed when complete, so nobody reads half a file
    with secure_write(str(hidden)) as file:
        json.dump({"version": VERSION, **data}, file)
    hidden.rename(path)
    return path


def remove(connection: Connection) -> None:
    """Delete a connection's file and socket directory."""
    if connection.path != Path():
        connection.path.unlink(missing_ok=True)
    if not connection.address.startswith("ipc://"):
        return
    folder = Path(connection.address.removeprefix("ipc://")).parent
    with contextlib.suppress(OSError):
        if folder.name.startswith(PREFIX) and _private(folder.lstat(), directory=True):
            shutil.rmtree(folder, ignore_errors=True)


def _private(status: os.stat_result, *, directory: bool) -> bool:
    kind = stat.S_ISDIR(status.st_mode) if directory else stat.S_ISREG(status.st_mode)
    # On Windows jupyter_core restricts the file, and the folder is in the user's profile.
    if not hasattr(os, "getuid"):
        return kind
    return kind and status.st_uid == os.getuid() and not status.st_mode & 0o077


def read(path: Path) -> Connection | None:
    """The connection, or None if the file cannot be trusted.

    Raises `OSError` when no descriptor is free, which says nothing about the file.
    """
    try:
        with open_plain(path, follow=False) as file:
            if not _private(os.fstat(file.fileno()), directory=False):
                return None
            data: dict[str, Any] = shallow_json(file.read(MAX_FILE_BYTES))
        if data.pop("version") != VERSION:
            return None
        # Fields of a newer llmkit are ignored.
        model = ModelDescription(**known(ModelDescription, data.pop("model")))
        connection = Connection(**known(Connection, data) | {"model": model, "path": path})
        if not all(
            isinstance(text, str)
            for text in (connection.address, connection.key, connection.server_key)
        ):
            return None
        safe = connection.address.startswith("ipc://") or (
            LOOPBACK.fullmatch(connection.address) is not None and len(connection.server_key) == 40
        )
        return connection if safe and len(connection.key) == 64 else None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def known(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``data`` that are fields of a dataclass; a newer version may send more."""
    return {f.name: data[f.name] for f in fields(kind) if f.name in data}


def find_connections(folder: Path | None = None) -> list[Connection]:
    """All live engines of this user on this machine, newest first.

    Removes the files of this machine's dead processes. Raises `OSError` when no descriptor is free.
    """
    found = []
    where = folder or runtime_dir()
    try:
        names = os.listdir(where)
    except FileNotFoundError:
        return []
    for path in (
        where / name for name in names if name.startswith(PREFIX) and name.endswith(SUFFIX)
    ):
        connection = read(path)
        if connection is None or not connection.is_here:
            continue
        if connection.is_alive:
            found.append(connection)
        else:
            remove(connection)
    return sorted(found, key=lambda c: (c.created, c.path.name), reverse=True)
