"""Which GGUF files lie in a folder, in Hugging Face's cache and in installed packages.

Looks at names and links only, and reads no file. Nothing outside a folder is ever named: a link
that leaves it is a fault, however it is spelled.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llmkit.models.names import gigabytes
from llmkit.models.splits import names_of, stem_of
from llmkit.system.text import printable

__all__ = ["OWN", "Found", "Source", "hub_cache", "is_projector", "scan_folder", "scan_hub"]

OWN = ".llmkit"  # a folder beside models, for what llmkit makes or has not yet finished
MAKING = ".making"  # ends the names of copies that are being made
STALE_S = 600.0  # nothing was written for so long: it is not being made any more
MAX_DEPTH, MAX_FILES = 12, 20_000
MAIN = "main"
PROJECTOR = re.compile(r"(^|[-_. ])mmproj([-_. ]|$)", re.IGNORECASE)
MATRIX = re.compile(r"(^|[-_. ])imatrix([-_. ]|$)", re.IGNORECASE)

Source = Literal["folder", "hub", "package"]


@dataclass(frozen=True, slots=True)
class Found:
    """A model by its files: all parts of a split one, in order, whether or not they are there.

    ``root`` is the folder that they may not leave, ``fault`` why they cannot be used.
    """

    id: str
    source: Source
    root: Path
    files: tuple[Path, ...]
    fault: str = ""

    @property
    def path(self) -> Path:
        """The first file, which stands for all."""
        return self.files[0]


def is_projector(name: str) -> bool:
    """Whether a file is by its name the part of a model that reads pictures or sounds."""
    return PROJECTOR.search(name.removesuffix(".gguf")) is not None


def is_model(name: str) -> bool:
    """Whether a file is by its name a model, or a part of one."""
    return name.endswith(".gguf") and not name.startswith(".") and not MATRIX.search(stem_of(name))


def leaves(path: Path, root: Path) -> str:
    """Why a file does not belong to a folder, after links and ``..`` are resolved; empty if it
    does."""
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            return f"it is a link to {printable(os.readlink(path))}, which is not there"
        return ""
    except (OSError, RuntimeError) as error:
        return f"it cannot be followed: {_why(error)}"
    if real.is_relative_to(root.resolve()):
        return ""
    return (
        f"it leads out of {printable(str(root))}, to {printable(str(real))}; "
        "move the file there, or name it by its own path"
    )


def _why(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def scan_folder(root: Path) -> tuple[list[Found], list[str]]:
    """The models in a folder and below it, and what could not be looked into.

    An id is the path in the folder, without ``.gguf`` and the numbers of a split model. Hidden
    folders are left out. Raises `OSError` if the folder itself cannot be read.
    """
    problems: list[str] = []
    found: list[Found] = []
    for folder, names in _folders(root, problems, strict=True):
        problems += _unfinished(folder / OWN, ".part")
        problems += _left_over(folder / OWN)
        place = folder.relative_to(root)
        found += _grouped(folder, names, root, "folder", partial(_joined, *place.parts))
    return found, problems


def _joined(*parts: str) -> str:
    """An id: safe to print, and the same on all systems."""
    return "/".join(printable(part) for part in parts)


def _folders(
    root: Path, problems: list[str], *, strict: bool = False
) -> Iterator[tuple[Path, list[str]]]:
    """Folders, and the names of models in each. Links to folders are not followed.

    Raises `OSError` for the root only, and only if ``strict``.
    """
    waiting = [(root, 0)]
    num_files = 0
    while waiting:
        folder, depth = waiting.pop()
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and os.path.isdir(entry.path):
                        outside = leaves(Path(entry.path), root)
                        if outside:  # inside, the models are found where they are
                            problems.append(f"{_joined(entry.name)} is left out: {outside}.")
                    elif entry.is_dir(follow_symlinks=False):
                        if depth < MAX_DEPTH:
                            waiting.append((Path(entry.path), depth + 1))
                        else:
                            problems.append(f"{_joined(entry.path)} lies too deep to be looked at.")
                    elif is_model(entry.name):
                        names.append(entry.name)
        except OSError as error:
            if folder == root and strict:
                raise
            problems.append(f"{_joined(str(folder))} cannot be read: {_why(error)}.")
            continue
        num_files += len(names)
        if num_files > MAX_FILES:
            problems.append(f"there are more than {MAX_FILES} files; the others are left out.")
            return
        if names or os.path.isdir(folder / OWN):
            yield folder, sorted(names)


def _unfinished(folder: Path, suffix: str) -> Iterator[str]:
    """Downloads that may be taken up again, or be in the way."""
    for part in _listed(folder, []):
        if part.suffix != suffix:
            continue
        try:
            size = gigabytes(part.stat().st_size)
        except OSError:  # it was finished, or removed
            continue
        yield (
            f"{size} of an unfinished download are in {_joined(str(part))}: pull the model again "
            "to go on, or remove the file."
        )


def _left_over(folder: Path) -> Iterator[str]:
    """Copies in another type whose making was killed."""
    for part in _listed(folder, []):
        if part.suffix != MAKING:
            continue
        try:
            status = part.stat()
        except OSError:  # it was finished, or removed
            continue
        if time.time() - status.st_mtime > STALE_S:
            yield (
                f"{gigabytes(status.st_size)} of an unfinished copy in another type are in "
                f"{_joined(str(part))}: what made it was killed; remove the file."
            )


def _grouped(
    folder: Path,
    names: Iterable[str],
    root: Path,
    source: Source,
    id_of: Callable[[str], str],
) -> Iterator[Found]:
    """The models of one folder: the parts of a split one together."""
    present = set(names)
    done: set[str] = set()
    for name in sorted(present):
        parts = names_of(name)
        if parts[0] in done:
            continue
        done.add(parts[0])
        files = tuple(folder / part for part in parts)
        missing = [part for part in parts if part not in present]
        faults = [f"{_joined(f.name)}: {w}" for f in files if (w := leaves(f, root))]
        if missing:
            shown = ", ".join(map(_joined, missing[:3])) + (" and more" if len(missing) > 3 else "")
            faults.append(f"{len(missing)} of its {len(parts)} files are missing: {shown}")
        stem = stem_of(name)
        if len(parts) > 1 and f"{stem}.gguf" in present:  # the name of a whole file is taken
            stem = parts[0].removesuffix(".gguf")
        yield Found(id_of(stem), source, root, files, "; ".join(faults))


def hub_cache() -> Path:
    """Hugging Face's cache, by its environment variables, or what the library was told."""
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return Path(constants.HF_HUB_CACHE)
    get = os.environ.get
    home = get("HF_HOME") or Path(get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def scan_hub(
    cache: Path, repo: str | None = None, revision: str | None = None
) -> tuple[list[Found], list[str]]:
    """The models in Hugging Face's cache, of one repository or all, and what could not be read.

    With a ``revision`` (a branch, tag or commit) only what that has. An id is
    ``org/repo:file.gguf`` for the newest revision on this machine, and
    ``org/repo@revision:file.gguf`` for what another one has differently.
    """
    problems: list[str] = []
    found: list[Found] = []
    folders = [cache / f"models--{repo.replace('/', '--')}"] if repo else _listed(cache, problems)
    for folder in folders:
        if not folder.name.startswith("models--"):
            continue
        problems += _unfinished(folder / "blobs", ".incomplete")
        name = printable(folder.name.removeprefix("models--").replace("--", "/"))
        known: dict[str, set[tuple[str, ...]]] = {}
        for label, snapshot in _snapshots(folder, revision, problems):
            for place, names in _folders(snapshot, problems):
                at = place.relative_to(snapshot)
                for each in _grouped(place, names, cache, "hub", lambda stem: stem):
                    file = _joined(*at.parts, each.path.name)
                    real = tuple(os.path.realpath(f) for f in each.files)
                    seen = known.setdefault(file, set())
                    if real in seen:
                        continue
                    at_revision = f"@{printable(label)}" if seen else ""
                    seen.add(real)
                    id_ = f"{name}{at_revision}:{file}"
                    found.append(Found(id_, "hub", cache, each.files, each.fault))
    return found, problems


def _listed(folder: Path, problems: list[str]) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{_joined(str(folder))} cannot be read: {_why(error)}.")
        return []


def _snapshots(folder: Path, revision: str | None, problems: list[str]) -> list[tuple[str, Path]]:
    """The snapshots of a repository by the names of their revisions: main first, then the
    newest."""
    named: dict[str, str] = {}
    refs = _listed(folder / "refs", problems) if revision is None else [folder / "refs" / revision]
    for ref in refs:
        try:
            if stat.S_ISREG(ref.stat().st_mode):
                with ref.open(errors="replace") as file:
                    named.setdefault(file.read(64).strip(), ref.name)
        except FileNotFoundError:  # a commit has no name
            named.setdefault(ref.name, ref.name[:12])
        except OSError as error:
            problems.append(f"{_joined(str(ref))} cannot be read: {_why(error)}.")
    dated: list[tuple[bool, float, str, Path]] = []
    for snapshot in _listed(folder / "snapshots", problems):
        try:
            if revision is not None and snapshot.name not in named:
                continue
            if snapshot.is_dir() and not snapshot.is_symlink():
                name = named.get(snapshot.name, snapshot.name[:12])
                dated.append((name != MAIN, -snapshot.stat().st_mtime, name, snapshot))
        except OSError as error:
            problems.append(f"{_joined(str(snapshot))} cannot be read: {_why(error)}.")
    return [(name, snapshot) for _, _, name, snapshot in sorted(dated)]
