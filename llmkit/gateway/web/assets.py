"""The scripts and styles of the pages, as they lie beside this file.

The folder in their address is a hash of all of them, so browsers may keep them for good: modules
import each other from the same folder. Pure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["MODULES", "STYLES", "Asset", "asset", "folder"]

STYLES = ("base.css", "layout.css", "messages.css")
# All that a page needs, so that none waits for another to be read.
MODULES = (
    *("main.js", "api.js", "composer.js", "conversation.js", "dom.js", "menu.js", "message.js"),
    *("models.js", "pictures.js", "session.js", "settings.js", "sidebar.js", "socket.js"),
    *("status.js", "thread.js", "tree.js"),
)
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the pages; ``is_current`` says that its address names this version of it."""

    data: bytes
    content_type: str
    etag: str
    is_current: bool


def folder() -> str:
    """Where the assets are, below the gateway's root."""
    return f"assets/{_version()}"


def asset(name: str) -> Asset | None:
    """The file with a name as in ``abc123/main.js``; None if there is none.

    One that is asked for by another version's address is the one that is here.
    """
    version, _, file = name.rpartition("/")
    data = _files().get(file)
    if data is None:
        return None
    etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
    return Asset(data, KINDS[Path(file).suffix], etag, version == _version())


@cache
def _files() -> dict[str, bytes]:
    here = Path(__file__).parent / "assets"
    return {path.name: path.read_bytes() for path in sorted(here.iterdir()) if path.suffix in KINDS}


@cache
def _version() -> str:
    hashed = hashlib.sha256()
    for name, data in _files().items():
        hashed.update(name.encode() + b"\0" + data)
    return hashed.hexdigest()[:12]
