"""The models that this process has loaded, by file and by name. Any thread."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Loaded", "loaded"]


class Loaded:
    """Handles by file (each is loaded once) and by name (newest last).

    The lock is never held during a load: a load holds its file's ``turn``, so only loads of the
    same file wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[Path, threading.RLock] = {}
        self._files: dict[Path, Any] = {}
        self._names: dict[str, Any] = {}
        self._claimed: set[str] = set()  # by loads in progress

    def turn(self, file: Path) -> threading.RLock:
        """The lock to hold while loading a file."""
        with self._lock:
            return self._turns.setdefault(file, threading.RLock())

    def of(self, file: Path) -> Any:
        """The handle of a file; None if it is not loaded."""
        return self._files.get(file)

    def claim(self, stem: str) -> str:
        """An unused name: the stem, or the stem with a number.

        ``add`` or ``release`` ends the claim.
        """
        with self._lock:
            taken = {
                name for name, handle in self._names.items() if not handle.closed
            } | self._claimed
            name = next(
                n
                for i in itertools.count(1)
                if (n := stem if i == 1 else f"{stem}-{i}") not in taken
            )
            self._claimed.add(name)
            return name

    def release(self, name: str) -> None:
        with self._lock:
            self._claimed.discard(name)

    def add(self, file: Path | None, handle: Any) -> None:
        """Add a loaded model as the newest of its name.

        Without a file it lives elsewhere, and does not take a name in use.
        """
        with self._lock:
            self._claimed.discard(handle.name)
            if file is None:
                if handle.name in self._names and not self._names[handle.name].closed:
                    return
            else:
                self._files[file] = handle
            self._names.pop(handle.name, None)
            self._names[handle.name] = handle

    def forget(self, handle: Any) -> None:
        name: str = handle.name
        with self._lock:
            for file, known in list(self._files.items()):
                if known is handle:
                    del self._files[file]
            if self._names.get(name) is handle:
                del self._names[name]

    def living(self) -> dict[str, Any]:
        """The open handles, by name. The process behind one may have ended."""
        with self._lock:
            for name in [name for name, handle in self._names.items() if handle.closed]:
                del self._names[name]
            return dict(self._names)

    def __getitem__(self, name: str) -> Any:
        return self.living()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.living())

    def __len__(self) -> int:
        return len(self.living())

    def begin_again(self) -> None:
        """In a forked child: engine threads, and threads that hold locks, do not exist here."""
        self.__init__()  # type: ignore[misc]


loaded = Loaded()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=loaded.begin_again)
