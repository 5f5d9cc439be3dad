"""The connection file: how a running engine is found without running a line of code in its kernel.

It lies in `jupyter_runtime_dir()`, 0600, and says who serves which model at which address. Readers trust it only when owner and mode are right and the
process that wrote it is still the same one. Home directories are often shared between hosts, so the file also says where its process id is valid.
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
from typing import Any, Literal

from llmkit.files import open_plain, shallow_json
from llmkit.types import ModelDescription

__all__ = ["Connection", "find_connections", "known", "life_of", "make_connection", "process_start_time", "read", "remove", "runtime_dir", "write"]

PREFIX, SUFFIX = "llmkit-", ".json"
VERSION = 2
LOOPBACK = re.compile(r"tcp://127\.0\.0\.1:[0-9]{1,5}")
MAX_FILE_BYTES = 1 << 20
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Connection:
    """One running engine as its connection file describes it."""

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
    server_key: str = field(default="", repr=False)  # of CURVE, where the address is TCP
    path: Path = field(default=Path(), compare=False)

    @property
    def kernel_name(self) -> str:
        """What stands behind the ``@`` of an exact model name: the kernel's id, else the process id."""
        return self.kernel_id or str(self.pid)

    @property
    def is_here(self) -> bool:
        """Whether the process id means anything on this machine."""
        return (self.host, self.boot_id, self.pid_namespace) == _place()

    @property
    def is_alive(self) -> bool:
        """Whether the very process that wrote the file still runs; also where that cannot be told just now."""
        return self.is_here and life_of(self.pid, self.start_time) != "gone"


def runtime_dir() -> Path:
    from jupyter_core.paths import jupyter_runtime_dir

    return Path(jupyter_runtime_dir())


def process_start_time(pid: int) -> float | None:
    """When a process started, in the system's own unit; None when there is none of that id (or it is a zombie). Raises `OSError` where that cannot be told
    (no descriptor is free, say)."""
    return _look_at(pid)[0]


def life_of(pid: int, start_time: float) -> Literal["alive", "stopped", "gone"]:
    """What has become of a process. Only what is known to be gone is gone."""
    try:
        started, is_stopped = _look_at(pid)
    except OSError:
        return "alive"
    if started != start_time:
        return "gone"
    return "stopped" if is_stopped else "alive"


def _look_at(pid: int) -> tuple[float | None, bool]:
    """When a process started, and whether it is stopped."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].decode().split()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return None, False
        return (None, False) if fields[0] in "ZX" else (float(fields[19]), fields[0] in "Tt")
    import psutil

    try:
        process = psutil.Process(pid)
        return float(process.create_time()), process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return None, False
    except psutil.Error as error:
        raise OSError(f"process {pid} cannot be looked at: {error}") from error


def _place() -> tuple[str, str, str]:
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", ""), boot, namespace


def make_connection(model: ModelDescription, kernel_id: str | None, created: float, *, tcp: bool = sys.platform == "win32") -> Connection:
    """A connection for an engine in this process, with a fresh key: a socket in a private directory on local disk (its path may have 107 bytes at most), or a
    ``tcp`` port of the loopback for whoever binds it to choose, where there are no such sockets."""
    start = process_start_time(os.getpid())
    host, boot, namespace = _place()
    address = "tcp://127.0.0.1:*" if tcp else f"ipc://{tempfile.mkdtemp(prefix=PREFIX, dir=_socket_root())}/s"
    return Connection(address, secrets.token_hex(32), os.getpid(), start or 0.0, host, boot, namespace, kernel_id, created, model)


def _socket_root() -> str:
    """A short local directory of the user's own if there is one."""
    root = os.environ.get("XDG_RUNTIME_DIR", "")
    if root and len(root) < 60 and os.access(root, os.W_OK) and os.stat(root).st_uid == os.getuid():
        return root
    for root in (tempfile.gettempdir(), "/tmp"):
        if len(root) < 70 and os.access(root, os.W_OK):
            return root
    return tempfile.gettempdir()


def write(connection: Connection) -> Path:
    """Write the file, readable for its owner only. Returns its path."""
    from jupyter_core.paths import secure_write

    folder = runtime_dir()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{PREFIX}{connection.pid}-{secrets.token_hex(4)}{SUFFIX}"
    data = asdict(connection)
    del data["path"]
    hidden = path.with_name("." + path.name)  # renamed when complete: nobody reads half a file
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
    if not hasattr(os, "getuid"):  # Windows: jupyter_core restricts the file, and the folder lies in the user's profile
        return kind
    return kind and status.st_uid == os.getuid() and not status.st_mode & 0o077


def read(path: Path) -> Connection | None:
    """A connection that may be trusted, else None. Raises `OSError` where no descriptor is free: that says nothing of the file."""
    try:
        with open_plain(path, follow=False) as file:
            if not _private(os.fstat(file.fileno()), directory=False):
                return None
            data: dict[str, Any] = shallow_json(file.read(MAX_FILE_BYTES))
        if data.pop("version") != VERSION:
            return None
        # What a newer llmkit says beside that is not for us.
        model = ModelDescription(**known(ModelDescription, data.pop("model")))
        connection = Connection(**known(Connection, data) | {"model": model, "path": path})
        if not all(isinstance(text, str) for text in (connection.address, connection.key, connection.server_key)):
            return None
        safe = connection.address.startswith("ipc://") or (LOOPBACK.fullmatch(connection.address) is not None and len(connection.server_key) == 40)
        return connection if safe and len(connection.key) == 64 else None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def known(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in ``data``: what a newer version says beside that is left out."""
    return {f.name: data[f.name] for f in fields(kind) if f.name in data}


def find_connections(folder: Path | None = None) -> list[Connection]:
    """All live engines of this user on this machine, newest first. Files of dead processes of this machine are removed. Raises `OSError` where no descriptor
    is free."""
    found = []
    where = folder or runtime_dir()
    try:
        names = os.listdir(where)
    except FileNotFoundError:
        return []
    for path in (where / name for name in names if name.startswith(PREFIX) and name.endswith(SUFFIX)):
        connection = read(path)
        if connection is None or not connection.is_here:
            continue
        if connection.is_alive:
            found.append(connection)
        else:
            remove(connection)
    return sorted(found, key=lambda c: (c.created, c.path.name), reverse=True)
