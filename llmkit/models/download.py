"""Files of the Hugging Face Hub, brought here: resumed, checked by SHA-256, one process at a time.

huggingface_hub says what there is and keeps its cache; the bytes are fetched here, because it
begins again from nothing after a failure and compares sizes only. It hands out files above 50 GB by
Xet alone, which cannot be resumed: those are left to its own command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.models import hub, scanning
from llmkit.models.gguf import start_fault
from llmkit.models.hub import HubFile, HubName, Unreachable
from llmkit.models.names import gigabytes
from llmkit.models.transfer import Part, Progress, check_room
from llmkit.system.text import printable

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["DownloadEvent", "Downloaded", "download", "download_files", "look_up"]

MAX_HTTP_BYTES = 50_000_000_000
LOOK_S = 0.2
Phase = Literal["looking", "waiting", "downloading", "verifying", "done"]


@dataclass(frozen=True, slots=True)
class DownloadEvent:
    """How far a download is: bytes of all its files together, ``speed`` in bytes a second.

    ``waiting`` is for another process that downloads the same file. ``digest`` is the file's
    SHA-256 on the Hub.
    """

    phase: Phase
    file: str = ""
    done: int = 0
    total: int = 0
    speed: float = 0.0
    digest: str = ""

    def __str__(self) -> str:
        if self.phase == "downloading":
            speed = f", {self.speed / 1e6:.1f} MB/s" if self.speed else ""
            return f"{gigabytes(self.done)} of {gigabytes(self.total)}{speed}"
        return "another process downloads it" if self.phase == "waiting" else self.phase


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What a download gave: ``path`` is the model's first file, ``name`` what was taken."""

    name: str
    path: Path
    files: tuple[Path, ...]
    mmproj: Path | None = None


def download(
    name: str,
    *,
    models_dir: Path | None = None,
    mmproj: bool = False,
    on_event: Callable[[DownloadEvent], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Downloaded:
    """The files of a model on the Hub, fetched as far as they are not here.

    Into Hugging Face's cache, or to ``models_dir/org/repo``. Without a way to the Hub, what is here
    is good. ``mmproj`` also fetches the file that reads pictures. ``on_event`` hears of progress
    ten times a second, ``cancelled`` is asked as often.

    Raises `InvalidRequestError` (no such spelling), `ModelNotFoundError` (no such repository,
    revision, file or type, none of several; the Hub is out of reach) and `DownloadError` (disk,
    network, checksum, cancelled): what arrived is kept, and the next call goes on from there. What
    the Hub has under such a name but is no GGUF file is one too, and is not kept.
    """
    wanted = HubName.parse(name)
    on_event(DownloadEvent("looking", str(wanted)))
    try:
        listed = {} if wanted.file and not mmproj else hub.files_of(wanted)
        parts = hub.choose(wanted, listed)
        projector = hub.projector_of(wanted, parts[0], listed) if mmproj else None
        files = [hub.about(wanted, part) for part in [*parts, *([projector] if projector else [])]]
    except Unreachable as error:
        return _here(wanted, models_dir, mmproj, str(error))
    taken = str(replace(wanted, file=parts[0], label=None))
    places = [_place(file, models_dir) for file in files]
    paths = _fetch(places, on_event, cancelled)
    size = sum(f.size for f in files)
    on_event(DownloadEvent("done", taken, size, size))
    model = paths[: len(parts)]
    return Downloaded(taken, model[0], tuple(model), paths[-1] if projector else None)


def look_up(name: str) -> str:
    """What `download` would take for a name, ``org/repo:file.gguf``; nothing is fetched.

    Raises what `download` raises for a name that means no file.
    """
    wanted = HubName.parse(name)
    try:
        first = hub.choose(wanted, {} if wanted.file else hub.files_of(wanted))[0]
        if wanted.file:  # else the Hub has just listed it
            hub.about(wanted, first)
    except Unreachable as error:
        return _here(wanted, None, False, str(error)).name
    return str(replace(wanted, file=first, label=None))


def download_files(
    name: HubName,
    files: Sequence[str],
    *,
    on_event: Callable[[DownloadEvent], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Files of one repository, fetched into Hugging Face's cache as far as they are not there.

    Raises as `download` does, and `Unreachable`.
    """
    places = [_place(hub.about(name, file), None) for file in files]
    return _fetch(places, on_event, cancelled)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file goes: ``data`` is what is fetched, ``part`` the same unfinished."""

    file: HubFile
    data: Path
    part: Path
    lock: Path
    root: Path
    pointer: Path | None  # in Hugging Face's cache, the file's name for the data

    @property
    def in_cache(self) -> bool:
        return self.pointer is not None

    @property
    def is_here(self) -> bool:
        # Where there are no links, the cache has the data under the name alone.
        return any(
            path is not None
            and path.is_file()
            and path.stat().st_size == self.file.size
            and _fault(self.file, path) is None  # a disk's power may have failed
            for path in (self.data, self.pointer)
        )

    @property
    def missing_bytes(self) -> int:
        have = self.part.stat().st_size if self.part.is_file() else 0
        return 0 if self.is_here else max(0, self.file.size - have)


def _place(file: HubFile, models_dir: Path | None) -> _Place:
    if models_dir is not None:
        root = Path(os.path.abspath(models_dir.expanduser()))
        target = root.joinpath(*file.repo.split("/"), *file.name.split("/"))
        own = target.parent / scanning.OWN
        part, lock = own / f"{file.etag}.part", own / f"{file.etag}.lock"
        return _Place(file, target, part, lock, root, None)
    cache = scanning.hub_cache()
    folder = f"models--{file.repo.replace('/', '--')}"
    blob = cache / folder / "blobs" / file.etag
    # The lock that huggingface_hub takes for the same file.
    lock = cache / ".locks" / folder / f"{file.etag}.lock"
    part = blob.with_name(f"{file.etag}.incomplete")
    pointer = cache / folder / "snapshots" / file.commit / file.name
    return _Place(file, blob, part, lock, cache, pointer)


def _fetch(
    places: list[_Place],
    on_event: Callable[[DownloadEvent], None],
    cancelled: Callable[[], bool],
) -> list[Path]:
    """Fetch all files that are not here; returns where they are."""
    total = sum(place.file.size for place in places)
    check_room(places[0].root, sum(place.missing_bytes for place in places))
    before = 0
    paths = []
    for place in places:
        file = place.file
        tell = partial(_tell, on_event, file, before, total)
        if not (place.in_cache and place.is_here):
            _fetch_one(place, Progress(tell, cancelled, file.name))
        paths.append(_linked(file) if place.in_cache else place.data)
        before += file.size
    return paths


def _tell(
    on_event: Callable[[DownloadEvent], None],
    file: HubFile,
    before: int,
    total: int,
    phase: Phase,
    done: int,
    speed: float,
) -> None:
    digest = file.etag if len(file.etag) == 64 else ""
    on_event(DownloadEvent(phase, file.name, before + done, total, speed, digest))


def _fetch_one(place: _Place, progress: Progress[Phase]) -> None:
    """Fetch a file that another process may be fetching too."""
    file = place.file
    if file.size > MAX_HTTP_BYTES:
        raise DownloadError(
            f"{file.name} has {gigabytes(file.size)}; above 50 GB the Hub serves files by Xet "
            f"only. Run `hf download {file.repo} {file.name}`, then name it again."
        )
    try:
        for folder in (place.data.parent, place.part.parent, place.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        outside = scanning.leaves(place.data.parent, place.root)
        if outside:
            raise DownloadError(f"{printable(str(place.data.parent))} cannot be used: {outside}.")
        lock = _turn(place.lock, progress)
    except OSError as error:
        raise DownloadError(
            f"{printable(str(place.root))} cannot be written: {error.strerror or error}."
        ) from None
    try:
        if place.in_cache and place.is_here:
            return
        part = Part(place.part, file, progress, partial(_fault, file))
        if place.is_here and part.has_digest_of(place.data):
            return
        part.complete()
        part.become(place.data)
    finally:
        lock.release()


def _fault(file: HubFile, path: Path) -> str | None:
    """Why it is not what its name says: anybody can upload anything."""
    try:
        return start_fault(path) if file.name.endswith(".gguf") else None
    except OSError as error:
        raise DownloadError(
            f"{printable(str(path))} cannot be read: {error.strerror or error}."
        ) from None


def _is_gguf(path: Path) -> bool:
    try:
        return start_fault(path) is None
    except OSError:
        return False


def _turn(path: Path, progress: Progress[Phase]) -> BaseFileLock:
    """The lock, held: on disks that have no locks a file that says so, as huggingface_hub does."""
    from filelock import FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path)
    while True:
        progress.check()
        try:
            lock.acquire(timeout=LOOK_S)
            return lock
        except Timeout:
            progress.tell("waiting", 0)
        except NotImplementedError:  # what filelock raises on such a disk
            lock = SoftFileLock(path)


def _linked(file: HubFile) -> Path:
    """The path of a file whose data is in Hugging Face's cache: the library links it there."""
    from huggingface_hub import hf_hub_download

    try:
        with hub.ask(HubName(file.repo, file.revision, file=file.name)):
            return Path(hf_hub_download(file.repo, file.name, revision=file.revision))
    except Unreachable as error:
        raise DownloadError(f"{file.name} was fetched, but not yet kept: {error}") from None


def _here(wanted: HubName, models_dir: Path | None, mmproj: bool, why: str) -> Downloaded:
    """The model as far as it is on this machine already. Raises `ModelNotFoundError`."""
    found = scanning.scan_hub(scanning.hub_cache(), wanted.repo, wanted.revision)[0]
    prefix = f"{wanted.repo}:"
    files = {f.id.removeprefix(prefix): f for f in found if f.id.startswith(prefix)}
    if models_dir is not None:
        folder = models_dir.expanduser().joinpath(*wanted.repo.split("/"))
        if folder.is_dir():
            files = {
                str(f.path.relative_to(folder).as_posix()): f
                for f in scanning.scan_folder(folder)[0]
            }
    files = {name: f for name, f in files.items() if not f.fault and _is_gguf(f.path)}
    try:
        listed: dict[str, int | None] = dict.fromkeys(files)
        first = hub.choose(wanted, listed)[0]
        projector = hub.projector_of(wanted, first, listed) if mmproj else None
        model = files[first]
    except (ModelNotFoundError, KeyError):
        raise ModelNotFoundError(f"{wanted} is not on this machine, and {why}") from None
    taken = str(replace(wanted, file=first, label=None))
    return Downloaded(taken, model.path, model.files, files[projector].path if projector else None)
