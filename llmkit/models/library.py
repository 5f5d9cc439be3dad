"""The models on this machine: in a folder, in Hugging Face's cache, and in packages.

Any thread. A broken or hostile file is an entry with a fault; looking never raises. What is made of
a header is kept for as long as the file does not change.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from llmkit.errors import (
    InvalidModelFileError,
    InvalidRequestError,
    LLMKitError,
    ModelNotFoundError,
)
from llmkit.models import gguf, registry, scanning, speech_files
from llmkit.models.hub import among
from llmkit.models.names import folded, gigabytes, near
from llmkit.models.projectors import nearest
from llmkit.models.quantization import label_of, type_of
from llmkit.models.registry import ModelSpec
from llmkit.models.scanning import Found, Source
from llmkit.models.splits import stem_of
from llmkit.system.text import printable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Library", "Listing", "StoredModel", "check_folder", "table_of"]

MAX_WORD = 64  # characters of what a header says about itself


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on disk. Sizes in bytes, contexts in tokens, ``modified`` in seconds since 1970.

    ``id`` names it: a path in the models dir without ``.gguf``, ``org/repo:file.gguf``, or an
    alias. ``files`` are all parts of a split model; ``path``, the first, stands for them.
    ``mmproj`` is the file beside it that reads pictures. With a ``fault`` it cannot be loaded.
    """

    id: str
    source: Source
    path: Path
    files: tuple[Path, ...]
    size_bytes: int = 0
    quantization: str = ""
    architecture: str = ""
    parameters: int = 0
    n_ctx: int = 0
    embeds: bool = False
    mmproj: Path | None = None
    modified: float = 0.0
    fault: str = ""

    @property
    def name(self) -> str:
        """What a model loaded from it is called."""
        return self.id if self.source == "package" else printable(stem_of(self.path.name))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: paths as printable text."""

        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return printable(str(value))
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


class Listing(Sequence[StoredModel]):
    """Models on disk as a table: ``df`` has a row for each; ``problems`` say what is left out."""

    def __init__(self, models: Sequence[StoredModel], problems: Sequence[str] = ()) -> None:
        self._models, self.problems = list(models), list(problems)

    @overload
    def __getitem__(self, at: int) -> StoredModel: ...

    @overload
    def __getitem__(self, at: slice) -> Listing: ...

    def __getitem__(self, at: int | slice) -> StoredModel | Listing:
        if isinstance(at, slice):
            return Listing(self._models[at], self.problems)
        return self._models[at]

    def __len__(self) -> int:
        return len(self._models)

    @property
    def df(self) -> pd.DataFrame:
        """One row per model."""
        import pandas as pd

        return pd.DataFrame(
            [m.as_dict() for m in self], columns=[f.name for f in fields(StoredModel)]
        )

    def rows(self) -> list[dict[str, str]]:
        """What people want to see of each model."""
        return [
            {
                "id": m.id,
                "size": gigabytes(m.size_bytes),
                "type": m.quantization,
                "parameters": _count(m.parameters),
                "context": str(m.n_ctx or ""),
                "architecture": m.architecture,
                "note": m.fault or ("reads pictures" if m.mmproj else ""),
            }
            for m in self
        ]

    def __repr__(self) -> str:
        return "\n".join([table_of(self.rows()) or "no model is on this machine", *self.problems])

    def _repr_html_(self) -> str:
        from html import escape

        notes = "".join(f"<p>{escape(p)}</p>" for p in self.problems)
        if not self._models:
            return f"<p>no model is on this machine</p>{notes}"
        import pandas as pd

        return f"{pd.DataFrame(self.rows()).to_html(index=False)}{notes}"


def table_of(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows in columns, for terminals; columns without any text are left out."""
    names = [n for n in (rows[0] if rows else ()) if any(row[n] for row in rows)]
    width = {n: max(len(n), *(len(row[n]) for row in rows)) for n in names}
    lines = [dict(zip(names, names, strict=True)), *rows]
    return "\n".join("  ".join(line[n].ljust(width[n]) for n in names).rstrip() for line in lines)


def _count(parameters: int) -> str:
    """A number of parameters as models are called by it: 135M, 8.03B."""
    if parameters < 1e6:
        return str(parameters or "")
    size, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{size:.3g}{unit}"


def check_folder(folder: Path) -> None:
    """Raises `InvalidRequestError` unless the folder can be read: said before anything starts."""
    try:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist; make it first"
            raise InvalidRequestError(
                f"the models dir {printable(str(folder))} {what}.", "models_dir"
            )
        with os.scandir(folder):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(
            f"the models dir {printable(str(folder))} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}. Give this user the right to read it.",
            "models_dir",
        ) from None


class Library:
    """What is on disk, by name.

    >>> Library(None).find("smollm2").quantization
    'Q4_1'

    ``keep_s`` is how long a look at the disk is good for finding names: a server that is asked for
    unknown ones would look at the whole disk each time.
    """

    def __init__(
        self, folder: Path | str | None = None, *, cache: Path | None = None, keep_s: float = 0.0
    ) -> None:
        self.folder = None if folder is None else Path(os.path.abspath(Path(folder).expanduser()))
        self._cache, self._keep_s = cache, keep_s
        self._seen: tuple[float, Listing, dict[str, StoredModel]] | None = None

    @property
    def cache(self) -> Path:
        """Hugging Face's cache."""
        return self._cache or scanning.hub_cache()

    def models(self) -> Listing:
        """All models: those in the models dir first, then the hub's, then packaged ones."""
        found: list[Found] = []
        problems: list[str] = []
        if self.folder is not None:
            try:
                found, problems = scanning.scan_folder(self.folder)
            except OSError as error:
                why = error.strerror or error
                problems = [f"the models dir {printable(str(self.folder))} cannot be read: {why}."]
        more, faults = scanning.scan_hub(self.cache)
        entries = [e for e in (_entry(f) for f in [*found, *more]) if e is not None]
        models = sorted(_paired(entries), key=lambda m: (m.source, folded(m.id)))
        for alias in registry.ALIASES:
            try:
                models += _packaged(alias)
            except (OSError, ImportError, ValueError) as error:
                faults.append(f"the package of {alias} cannot be read: {error}.")
        listing = Listing(models, [*problems, *faults])
        self._seen = time.monotonic(), listing, {m.id: m for m in reversed(models)}
        return listing

    def _recent(self) -> tuple[Listing, Mapping[str, StoredModel]]:
        """What was seen last if that is recent, else what is there now; in order, and by id."""
        if self._seen is None or time.monotonic() - self._seen[0] >= self._keep_s:
            self.models()
        assert self._seen is not None
        return self._seen[1:]

    def get(self, name: str) -> StoredModel | None:
        """The model of exactly that name, or that was downloaded to the models dir by it, which
        comes first. Looks for no similar names, so it costs little."""
        known = self._recent()[1].get(name)
        is_own = known is not None and known.source == "folder"
        return known if is_own else next(iter(self._downloaded(name)), known)

    def find(self, name: str) -> StoredModel:
        """The model of that name: exactly, else in any case if only one is meant.

        What lies in the models dir counts by the name that it was downloaded by too, and by a path.
        Raises `ModelNotFoundError` with similar names, or saying why the file is not served.
        """
        models = list(self._recent()[0])
        text = str(name)
        for same in (
            [m for m in models if m.id == text],
            [m for m in models if m.id == text.removesuffix(".gguf")],
            [m for m in models if folded(m.id) == folded(text)],
            [m for m in models if folded(m.id) == folded(text).removesuffix(".gguf")],
            self._downloaded(text),
            self._at(text, models),
        ):
            same = [m for m in same if m.source == same[0].source]  # in the order of `models`
            if len(same) == 1:
                return same[0]
            if same:
                names = ", ".join(repr(m.id) for m in same[:5])
                raise ModelNotFoundError(f"{text!r:.200} may be {names}; write it exactly.")
        hint = near(text, [m.id for m in models])
        raise ModelNotFoundError(
            f"there is no model {text!r:.200} on this machine{hint} `llmkit models list` shows "
            "what there is."
        )

    def _downloaded(self, text: str) -> list[StoredModel]:
        """What lies where a model of the Hub with that name is downloaded to; see `among`."""
        if self.folder is None:
            return []
        models, folder = self._recent()[0], self.folder

        def here(repo: str) -> Mapping[str, StoredModel]:
            own = [m for m in models if m.source == "folder" and m.id.startswith(f"{repo}/")]
            return {m.path.relative_to(folder / repo).as_posix(): m for m in own}

        found = among(text, here)
        return [] if found is None else [found]

    def _at(self, text: str, models: list[StoredModel]) -> list[StoredModel]:
        """The model at a path; none if the text is no path. Raises `ModelNotFoundError` for a
        path out of the models dir."""
        if self.folder is None or "\0" in text or not (os.path.isabs(text) or ".." in text):
            return []
        real = Path(os.path.realpath(self.folder / text))
        if not real.is_relative_to(os.path.realpath(self.folder)):
            raise ModelNotFoundError(
                f"{text!r:.200} leads out of the models dir {printable(str(self.folder))}."
            )
        found = [m for m in models if str(real) in map(os.path.realpath, m.files)]
        return sorted(found, key=lambda m: m.path.is_symlink())[:1]  # itself before its links

    def resolve(self, name: str) -> ModelSpec:
        """The model of that name, to be loaded.

        Raises `ModelNotFoundError`, and `InvalidModelFileError` with the fault of a broken one.
        """
        model = self.find(name)
        if model.source == "package":
            return registry.resolve(model.id)
        if model.source == "folder":  # a link may have changed since
            assert self.folder is not None
            outside = next((w for f in model.files if (w := scanning.leaves(f, self.folder))), "")
            model = replace(model, fault=outside) if outside else model
        if model.fault:
            raise InvalidModelFileError(f"{model.id} cannot be loaded: {model.fault}")
        return ModelSpec(model.name, model.path)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a header says."""

    kind: str = ""
    quantization: str = ""
    architecture: str = ""
    parameters: int = 0
    n_ctx: int = 0
    embeds: bool = False
    fault: str = ""


@lru_cache(maxsize=4096)
def _facts(path: Path, marks: tuple[tuple[int, int], ...]) -> _Facts:
    """Of a model's files with these sizes and times. Raises `OSError`, so that what may be mended
    without changing the file is not kept."""
    try:
        if kind := speech_files.speech_kind(path):
            return _Facts("model", architecture=kind)
        info = gguf.read_header(path)
        return _Facts(
            _word(info.metadata.get("general.type", "model")),
            _word(type_of(info)),
            _word(info.architecture),
            sum(math.prod(t.shape) for t in info.tensors),
            info.n_ctx_train,
            info.value("pooling_type") in (1, 2, 3, 4),
        )
    except OSError:
        raise
    except LLMKitError as error:
        return _Facts(fault=printable(str(error)))
    except Exception as error:  # a header that nobody thought of is a fault too
        return _Facts(fault=f"its header cannot be read: {error!r:.200}")


def _word(value: object) -> str:
    return printable(str(value))[:MAX_WORD]


def _entry(found: Found) -> StoredModel | None:
    """A model with what its header says; None for what is no model but an adapter, say."""
    present: list[os.stat_result] = []
    fault = found.fault
    facts = _Facts()
    try:
        present = [f.stat() for f in found.files if not fault or f.exists()]
        if not fault:
            marks = tuple((s.st_size, s.st_mtime_ns) for s in present)
            facts = _facts(found.path, marks)
            fault = facts.fault
    except (OSError, ValueError) as error:
        fault = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    if facts.kind in ("adapter", "imatrix"):
        return None
    is_projector = facts.kind == "mmproj" or facts.architecture == "clip"
    return StoredModel(
        found.id,
        found.source,
        found.path,
        found.files,
        sum(s.st_size for s in present),
        facts.quantization or label_of(found.path.name),
        "clip" if is_projector or scanning.is_projector(found.path.name) else facts.architecture,
        facts.parameters,
        facts.n_ctx,
        facts.embeds,
        modified=max((s.st_mtime for s in present), default=0.0),
        fault=fault,
    )


def _paired(entries: list[StoredModel]) -> Iterator[StoredModel]:
    """The models, each with its projector; projectors are no entries of their own."""
    beside: dict[Path, list[StoredModel]] = {}
    for entry in entries:
        if entry.architecture == "clip" and not entry.fault:
            beside.setdefault(entry.path.parent, []).append(entry)
    for entry in entries:
        if entry.architecture != "clip":
            near_by = beside.get(entry.path.parent, [])
            found = nearest(entry.path, ((c.path, c.quantization) for c in near_by))
            yield replace(entry, mmproj=found)


def _packaged(alias: str) -> Iterator[StoredModel]:
    """An alias, if its package is installed. Nothing is joined or converted for this."""
    files, ready = registry.packaged_files(alias)
    if files:
        path = ready or files[0]
        entry = _entry(Found(alias, "package", path.parent, (path,))) if ready else None
        folder = files[0] / "model.safetensors"
        size = sum(f.stat().st_size for f in [*files, folder] if f.is_file())
        yield entry or StoredModel(
            alias, "package", path, tuple(files), size, label_of(files[0].name)
        )
