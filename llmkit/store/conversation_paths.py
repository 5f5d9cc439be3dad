"""Paths that were read before, so that a follow-up turn reads only what is new. Any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from llmkit.store.conversation_records import StoredMessage

__all__ = ["Paths"]

MAX_CHARS, OVERHEAD = 32 << 20, 500  # of all of them; of a message beside its text
MAX_RUNNING = 1000
Path = tuple[StoredMessage, ...]
NOTHING: tuple[Path, int] = ((), 0)


class Paths:
    """The latest path of each conversation that was read last, of bounded size.

    Messages never change, except one that is running: it is left out.
    """

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._paths: OrderedDict[str, tuple[Path, int]] = OrderedDict()  # with their sizes
        self._chars = 0
        self._running: OrderedDict[str, StoredMessage] = OrderedDict()

    def get(self, conversation_id: str) -> Path:
        """What is known of a path; perhaps nothing."""
        with self._lock:
            path, _ = self._paths.get(conversation_id, NOTHING)
            if path:
                self._paths.move_to_end(conversation_id)
            return path

    def keep(self, conversation_id: str, path: Sequence[StoredMessage]) -> None:
        """Remember a path that was read."""
        complete = len(path) - (bool(path) and path[-1].status == "running")
        with self._lock:
            known, size = self._paths.get(conversation_id, NOTHING)
            count = len(known)
            if not known or count > complete or path[count - 1] is not known[-1]:
                known, size, count = (), 0, 0
            self._put(conversation_id, known, size, path[count:complete])

    def extend(self, conversation_id: str, messages: Sequence[StoredMessage]) -> None:
        """Remember messages that were stored, if they go on where a known path ends."""
        new = [message for message in messages if message.status != "running"]
        with self._lock:
            self._running.update((m.id, m) for m in messages if m.status == "running")
            while len(self._running) > MAX_RUNNING:
                self._running.popitem(last=False)
            known, size = self._paths.get(conversation_id, NOTHING)
            if known and new and known[-1].id == new[0].parent_id:
                self._put(conversation_id, known, size, new)

    def ended(self, message_id: str) -> StoredMessage | None:
        """A running reply that was begun here, as it was then; only once."""
        with self._lock:
            return self._running.pop(message_id, None)

    def _put(
        self, conversation_id: str, known: Path, size: int, new: Sequence[StoredMessage]
    ) -> None:
        if not new:
            return
        size += sum(message.size + OVERHEAD for message in new)
        self._chars += size - self._paths.pop(conversation_id, NOTHING)[1]
        self._paths[conversation_id] = (*known, *new), size
        while self._chars > self._max_chars:
            _, (_, freed) = self._paths.popitem(last=False)
            self._chars -= freed

    def drop(self, conversation_id: str) -> None:
        """Forget a path."""
        with self._lock:
            self._chars -= self._paths.pop(conversation_id, NOTHING)[1]
