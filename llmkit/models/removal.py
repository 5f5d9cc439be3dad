"""Removing a model's files: never anything outside the models dir or Hugging Face's cache."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import InvalidRequestError
from llmkit.models import scanning
from llmkit.models.copies import copies_of, former_copies_of
from llmkit.models.library import Library, StoredModel
from llmkit.system.text import printable

__all__ = ["Removed", "files_to_remove", "remove"]


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed, and the bytes that it took."""

    files: tuple[Path, ...]
    size_bytes: int


def files_to_remove(library: Library, model: StoredModel) -> list[Path]:
    """The files of a model: its parts, a projector that no other model has, copies in other types,
    and in Hugging Face's cache the data behind the names.

    Raises `InvalidRequestError` for a packaged model.
    """
    if model.source == "package":
        raise InvalidRequestError(
            f"{model.id} comes in a package; `pip uninstall` removes it.", "model"
        )
    files = [f for f in model.files if os.path.lexists(f)]
    files += _copies(model)
    others = [m for m in library.models() if m.id != model.id]
    if model.mmproj is not None and model.mmproj not in [m.mmproj for m in others]:
        files.append(model.mmproj)
    if model.source == "hub":
        files = [f for name in files for f in [*_same_in_cache(library.cache, name), name]]
    return list(dict.fromkeys(files))


def remove(library: Library, model: StoredModel) -> Removed:
    """Remove a model's files, and folders that are empty then.

    Of a link the link is removed, not what it leads to. Raises `InvalidRequestError` for a packaged
    model, and for a folder that leaves the models dir; `OSError` for what cannot be removed.
    """
    root = library.cache if model.source == "hub" else library.folder
    assert root is not None
    files, copies = files_to_remove(library, model), _copies(model)
    for file in files:
        outside = scanning.leaves(file.parent, root)
        if outside and file not in copies:  # which may lie in llmkit's cache
            name = printable(str(file))
            raise InvalidRequestError(f"{name} is not removed: {outside}.", "model")
    size = 0
    for file in files:
        size += 0 if file.is_symlink() else file.stat().st_size
        file.unlink()
    for folder in dict.fromkeys(f.parent for f in files):
        _remove_empty(folder, root)
    if model.source == "hub":
        repo = next(p for p in model.path.parents if p.parent == root)
        if not (repo / "snapshots").exists() and not (repo / "blobs").exists():
            shutil.rmtree(repo, ignore_errors=True)  # names of revisions that are no more
    return Removed(tuple(files), size)


def _copies(model: StoredModel) -> list[Path]:
    """The model in other types; none of one whose files are not all there."""
    if not all(f.is_file() for f in model.files):
        return []
    return [*copies_of(model.files), *former_copies_of(model.files)]


def _remove_empty(folder: Path, root: Path) -> None:
    """A folder and those above it that hold nothing else, below the root."""
    while folder != root and folder.is_relative_to(root):
        own = folder / scanning.OWN
        try:
            if own.is_dir():
                _remove_own(own)
            folder.rmdir()
        except (OSError, NotImplementedError):  # not empty; or a disk that has no locks
            return
        folder = folder.parent


def _remove_own(own: Path) -> None:
    """Llmkit's folder beside models, if it holds nothing but locks that nobody has: a download that
    runs there needs its own. Raises `OSError`, and `NotImplementedError` where there are no locks.
    """
    from filelock import FileLock

    locks = list(own.iterdir())
    if any(file.suffix != ".lock" for file in locks):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), own)
    for lock in locks:
        with FileLock(lock).acquire(timeout=0):  # an `OSError` if somebody has it
            if os.name == "posix":
                lock.unlink()
        if os.name != "posix":  # there no file goes that anybody has opened
            lock.unlink(missing_ok=True)
    own.rmdir()


def _same_in_cache(cache: Path, name: Path) -> list[Path]:
    """In Hugging Face's cache: the data behind a file's name, if no other name is left for it, and
    the other revisions' names of the same file for the same data."""
    repo = next(p for p in name.parents if p.parent == cache)
    data = repo / "blobs" / os.path.basename(os.readlink(name)) if name.is_symlink() else name
    within = name.relative_to(repo).parts[2:]  # snapshots/REVISION/...
    names = [
        snapshot.joinpath(*within)
        for snapshot in (repo / "snapshots").iterdir()
        if snapshot.joinpath(*within).is_symlink()
        and os.path.basename(os.readlink(snapshot.joinpath(*within))) == data.name
    ]
    used_by_others = any(
        other.is_symlink() and os.path.basename(os.readlink(other)) == data.name
        for other in (repo / "snapshots").rglob("*")
        if other not in names
    )
    return names if used_by_others or not os.path.lexists(data) else [*names, data]
