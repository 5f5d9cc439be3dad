"""A model's weights in another type: made once, in a child process, and kept.

llama.cpp's quantizer may end its process, and takes minutes for large models: the child can be
ended at any time. The file appears only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llmkit.bridge.child import Child, Line, Owner
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.models import gguf
from llmkit.models.copies import former_copies_of, places_for
from llmkit.models.disk import lack_of_room
from llmkit.models.names import gigabytes
from llmkit.models.quantization import TYPES, kind_of, scaled, step_to, type_of
from llmkit.models.registry import ModelSpec, cache_folder
from llmkit.models.scanning import MAKING
from llmkit.system.endings import ended, reason_in
from llmkit.system.text import printable

__all__ = ["Quantized", "child", "quantized"]

TARGET = "llmkit.runtime.quantizing:child"
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Quantized:
    """A file, and what to know about it: ``note``, why nothing was done or what it costs, and a
    ``detail`` of what was ``made``."""

    path: Path
    note: str = ""
    detail: str = ""
    made: bool = False


def quantized(
    spec: ModelSpec,
    kind: str,
    *,
    target: Path | None = None,
    upward: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Quantized:
    """The model in type ``kind``: its own file if it is that, a copy made earlier, or a new one.

    Without a ``target`` the copy is kept beside the model or in llmkit's cache. From a quantized
    model only smaller types are made, with a note, unless ``upward``.

    Raises `InvalidRequestError` (no such type, a larger one, the target exists),
    `InvalidModelFileError`, and `ModelLoadError` (no room, cancelled, llama.cpp's reason).
    """
    kind = kind_of(kind)
    info = gguf.read_header(spec.path)
    what = info.metadata.get("general.type", "model")
    if what != "model" or info.architecture == "clip":
        raise InvalidRequestError(f"{spec.name} is not a model but {what!r:.40}.", "quantize")
    if target is not None and target.exists():
        raise InvalidRequestError(
            f"{printable(str(target))} exists already; remove it, or choose another name.", "out"
        )
    note = _judge(spec, info, kind, upward)
    if step_to(info, kind) == "same" and target is None:
        return Quantized(spec.path, note)
    places = [target] if target is not None else places_for(info.files, kind)
    for place in places:
        if target is None and _is_whole(place):
            return Quantized(place, note)
    place = _with_room(places, scaled(info, kind).file_bytes)
    return _make(spec, info, kind, place, note, on_progress, cancelled)


def _judge(spec: ModelSpec, info: gguf.ModelInfo, kind: str, upward: bool) -> str:
    """What to know before. Raises `InvalidRequestError` for what gains nothing."""
    have, step = type_of(info), step_to(info, kind)
    if step == "same":
        return f"{spec.name} is {kind} already."
    if step == "up":
        larger = (
            f"{spec.name} is {have}: {kind} is larger and cannot restore the precision already "
            "lost."
        )
        if not upward:
            raise InvalidRequestError(
                f"{larger} Leave quantize out, name a smaller type, or start from the F16 file.",
                "quantize",
            )
        return larger
    if step == "again":
        return (
            f"{spec.name} is {have}, and loses precision a second time as {kind}; a {kind} file "
            "made from F16 answers better."
        )
    return ""


def _is_whole(path: Path) -> bool:
    try:
        gguf.read_header(path)
    except (ModelLoadError, OSError):
        return False
    return True


def _with_room(places: list[Path], need: int) -> Path:
    """The first place that can be written and has room. Raises `ModelLoadError`."""
    lacks = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place.parent):
                pass
        except OSError as error:
            lacks.append(f"{printable(str(place.parent))} cannot be written: {error.strerror}")
            continue
        lack = lack_of_room(place.parent, need)
        if not lack:
            return place
        lacks.append(lack)
    raise ModelLoadError(f"there is no place for the quantized copy: {'; '.join(lacks)}.")


def _make(
    spec: ModelSpec,
    info: gguf.ModelInfo,
    kind: str,
    place: Path,
    note: str,
    on_progress: Callable[[float], None],
    cancelled: Callable[[], bool],
) -> Quantized:
    """Make the file, unless another process does so meanwhile."""
    from filelock import FileLock, Timeout

    # The lock is this user's, and so is the unfinished file.
    locks = cache_folder().parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    lock = FileLock(locks / f"quantize-{mark}.lock")
    part = place.with_name(f".{mark}-{getattr(os, 'getuid', int)()}{MAKING}")
    while True:
        _check(spec, cancelled)
        try:
            lock.acquire(timeout=LOOK_S)
            break
        except Timeout:
            on_progress(0.0)
    try:
        if _is_whole(place):  # made by another process, which we waited for
            return Quantized(place, note)
        part.unlink(missing_ok=True)  # of a process that was killed
        facts = _run(spec, info, kind, part, on_progress, cancelled)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        gguf.read_header(part)
        os.replace(part, place)
        for former in former_copies_of(info.files):
            with contextlib.suppress(OSError):
                former.unlink()
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        lock.release()
    detail = ""
    if facts["num_fallbacks"]:
        detail = (
            f"{facts['num_fallbacks']} of {facts['num_tensors']} tensors got another type, since "
            f"their rows do not divide into blocks of {kind}: {facts['bits']:.2f} bits a weight, "
            f"not {TYPES[kind].bits:.2f}."
        )
    return Quantized(place, note, detail, made=True)


def _check(spec: ModelSpec, cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise ModelLoadError(f"quantizing {spec.name} was cancelled; no file is left.")


def _run(
    spec: ModelSpec,
    info: gguf.ModelInfo,
    kind: str,
    part: Path,
    on_progress: Callable[[float], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Run the child to its end; returns what it said of the file."""
    task = {
        "path": os.fsdecode(info.path),
        "part": os.fsdecode(part),
        "number": TYPES[kind].number,
        "header_bytes": info.file_bytes - sum(t.num_bytes or 0 for t in info.tensors),
    }
    said = Line()
    with tempfile.TemporaryFile() as words:
        child = Child(TARGET, task, environment={"CUDA_VISIBLE_DEVICES": ""}, errors=words)
        try:
            while True:
                _check(spec, cancelled)
                with contextlib.suppress(msgspec.DecodeError):  # not an answer
                    said = child.read(LOOK_S) or said
                if said.progress is not None:
                    on_progress(said.progress)
        except EOFError:
            child.wait(LOOK_S * 100)
        finally:
            child.close_input()
            child.kill()
        if said.failure is not None:
            raise said.failure.error()
        if said.ready is not None:
            return said.ready
        words.seek(0)
        reason = reason_in(words.read(1 << 20).decode("utf-8", "replace").splitlines())
        lack = lack_of_room(part.parent, scaled(info, kind).file_bytes)
        raise ModelLoadError(
            f"the process that quantized {spec.name} {ended(child.status)}. "
            f"{lack or reason}".rstrip()
        )


def child(owner: Owner) -> None:
    """Entry point of the child process."""
    from llmkit.backend.library import num_threads
    from llmkit.backend.quantize import quantize

    _no_core_file()
    task = owner.task
    source, part = Path(task["path"]), Path(task["part"])
    how: dict[str, Any] = {"number": task["number"], "threads": num_threads()}
    size = quantize(source, part, only_size=True, **how).size_bytes + task["header_bytes"]
    lack = lack_of_room(part.parent, size)
    if lack:
        raise ModelLoadError(f"there is no room for the quantized copy: {lack}. Free some.")
    try:
        made = quantize(source, part, on_progress=owner.progress, **how)
    except ModelLoadError:
        left = size - (part.stat().st_size if part.exists() else 0)
        if left > 0 and lack_of_room(part.parent, left):
            raise ModelLoadError(
                f"the disk is full: the quantized copy of {source.name} needs "
                f"{gigabytes(size)} in {printable(str(part.parent))}. Free some and try again."
            ) from None
        raise
    owner.ready(bits=made.bits, num_fallbacks=made.num_fallbacks, num_tensors=made.num_tensors)
    os._exit(0)


def _no_core_file() -> None:
    """An assert of llama.cpp is an answer, not worth a core file of the model's size."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
