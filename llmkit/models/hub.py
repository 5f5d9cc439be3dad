"""Names of files on the Hugging Face Hub, and what the Hub says about them.

``org/repo:file.gguf`` is a file, ``org/repo:Q4_K_M`` the one with that type of weights,
``org/repo`` a sensible one, and ``org/repo@revision:...`` all that at a branch, tag or commit.
``org/repo:file.gguf@org/other`` names the repository of the tokenizer too, which must be that of
the file. huggingface_hub asks, with its own settings (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.models.names import folded, gigabytes
from llmkit.models.quantization import LABEL, PROJECTOR_ORDER, label_of
from llmkit.models.scanning import is_model, is_projector
from llmkit.models.splits import first_of, names_of
from llmkit.models.transfer import transport_errors
from llmkit.system.text import printable

__all__ = [
    "HubFile",
    "HubName",
    "NoGGUFError",
    "Unreachable",
    "among",
    "ask",
    "choose",
    "files_of",
    "is_hub_name",
    "is_path",
    "is_repository",
]

NAME = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95}?)(?:@(?P<revision>[\w./-]{1,200}))?"
    r"(?::(?P<what>[^\0-\x1f\x7f\\:]{1,1000}))?",
    re.ASCII,
)
PAGE = re.compile(r"/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>.+?\.gguf)(?:\?.*)?$")
# Without a type: what most people want first.
USUAL = (
    "Q4_K_M", "UD-Q4_K_XL", "Q4_K_S", "IQ4_XS", "Q4_0", "MXFP4", "Q5_K_M", "Q6_K", "Q8_0", "BF16",
    "F16", "F32",
)  # fmt: skip
SHOWN = 12
T = TypeVar("T")


class NoGGUFError(ModelNotFoundError):
    """The repository is there, but has no GGUF model."""


class Unreachable(Exception):
    """The Hub cannot be asked, or does not let us in; what is on this machine may do."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A name, taken apart: a ``file``, or the ``label`` of a type of weights, or neither."""

    repo: str
    revision: str | None = None
    file: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Raises `InvalidRequestError`.

        >>> HubName.parse("org/repo:Q4_K_M").label
        'Q4_K_M'
        """
        page = PAGE.search(text)
        if page is not None and text.startswith(
            ("http://", "https://", "hf.co/", "huggingface.co/")
        ):
            text = f"{text[: page.start()]}@{page['revision']}:{page['file']}"
        match = NAME.fullmatch(text)
        if match is None or "--" in match["repo"] or ".." in match["repo"] + (match[2] or ""):
            raise InvalidRequestError(
                f"{printable(text)!r:.200} is no name on the Hugging Face Hub: write "
                "org/repo:file.gguf, org/repo:Q4_K_M or org/repo.",
                "model",
            )
        what = match["what"]
        if what is None:
            return cls(match["repo"], match["revision"])
        what, _, tokenizer = what.partition(".gguf@")
        if tokenizer:
            _check_tokenizer(match["repo"], tokenizer)
            what += ".gguf"
        if what.endswith(".gguf"):
            if not is_path(what):
                raise InvalidRequestError(f"{what!r:.200} is no path in a repository.", "model")
            return cls(match["repo"], match["revision"], file=what)
        label = label_of(what)
        if LABEL.fullmatch(what) is None or not label:
            raise InvalidRequestError(
                f"{what!r:.80} is neither a .gguf file nor a type of weights, such as Q4_K_M; "
                f"`llmkit models pull {match['repo']}` takes a usual one.",
                "model",
            )
        return cls(match["repo"], match["revision"], label=label)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        what = self.file or self.label
        return f"{self.repo}{revision}" + (f":{what}" if what else "")


def is_path(name: str) -> bool:
    """Whether this may be a file of a repository: it leads nowhere else, and is safe to print.

    >>> is_path("sub/model.gguf"), is_path("../model.gguf")
    (True, False)
    """
    parts = name.split("/")
    is_plain = name.isprintable() and "\\" not in name and ":" not in name  # of Windows
    return is_plain and not {"", ".", ".."} & {*parts}


def is_hub_name(text: str) -> bool:
    """Whether this names a file on the Hub, or a type of weights in a repository.

    ``org/repo`` alone may as well be a folder, so it counts only where the Hub is meant anyway.
    """
    try:
        name = HubName.parse(text)
    except InvalidRequestError:
        return False
    return name.file is not None or name.label is not None


def is_repository(text: str) -> bool:
    """Whether this may name a repository, ``org/repo``: also of safetensors, and also a folder.

    >>> is_repository("Qwen/Qwen3-0.6B"), is_repository("models/some.gguf")
    (True, False)
    """
    try:
        name = HubName.parse(text)
    except InvalidRequestError:
        return False
    return name.file is None and name.label is None and not name.repo.endswith(".gguf")


def _check_tokenizer(repo: str, tokenizer: str) -> None:
    """A GGUF file has a tokenizer of its own: what is named must be its own too."""
    own = folded(repo.partition("/")[2]).removesuffix("-gguf")
    named = folded(tokenizer.rpartition("/")[2])
    if own != named and not own.endswith(f"_{named}"):
        raise InvalidRequestError(
            f"a GGUF file of {repo} has its own tokenizer, and that of "
            f"{printable(tokenizer)!r:.200} cannot take its place; leave out what follows the @.",
            "model",
        )


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the Hub. ``etag`` is its SHA-256 if it is stored by LFS, else git's SHA-1."""

    repo: str
    name: str
    revision: str | None
    commit: str
    size: int
    etag: str
    url: str


@contextlib.contextmanager
def ask(name: HubName) -> Iterator[None]:
    """Say what the Hub refused. Raises `ModelNotFoundError`, and `Unreachable` with the reason."""
    from huggingface_hub import errors

    failures: tuple[type[Exception], ...] = (ValueError, *transport_errors())
    try:
        yield
    except errors.GatedRepoError:
        raise Unreachable(
            f"{name.repo} is gated: accept its terms on the Hub, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise Unreachable(
            f"there is no repository {name.repo} on the Hub, or it is private "
            "(log in with `hf auth login`)."
        ) from None
    except errors.RevisionNotFoundError:
        revision = name.revision or "main"
        raise ModelNotFoundError(f"{name.repo} has no revision {revision!r}.") from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise Unreachable(f"the Hub cannot be reached: {error.__cause__ or error}") from None
        raise ModelNotFoundError(f"{name.repo} has no file {name.file!r}{_there(name)}") from None
    except errors.OfflineModeIsEnabled:
        raise Unreachable("HF_HUB_OFFLINE forbids asking the Hub; unset it to download.") from None
    except errors.HfHubHTTPError as error:
        raise Unreachable(_status(error)) from None
    except failures as error:
        raise Unreachable(f"the Hub cannot be reached: {error}") from None


def _there(name: HubName) -> str:
    """What a repository has instead of a file."""
    try:
        files = list(files_of(HubName(name.repo, name.revision)))
    except (ModelNotFoundError, Unreachable):  # the list only improves the message
        return "."
    if not files:
        return "; it has no GGUF file."
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"; it has {', '.join(map(printable, files[:SHOWN]))}{more}."


def _status(error: OSError) -> str:
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", 0)
    if code in (401, 403):
        return (
            f"the Hub does not let us in (status {code}): check the token in HF_TOKEN, or log in "
            "with `hf auth login`."
        )
    if code == 429:
        return "the Hub asks us to slow down (status 429): try again in some minutes."
    return f"the Hub answered with status {code}: {str(error).splitlines()[0]:.200}"


def files_of(name: HubName) -> dict[str, int | None]:
    """The GGUF files of a repository, and their sizes; not those whose names are no paths.

    Raises as `ask` does.
    """
    from huggingface_hub import HfApi

    with ask(name):
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    found = {f.rfilename: f.size for f in info.siblings or () if f.rfilename.endswith(".gguf")}
    return {name: size for name, size in found.items() if is_path(name)}


def about(name: HubName, file: str) -> HubFile:
    """What the Hub knows of a file. Raises as `ask` does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with ask(HubName(name.repo, name.revision, file=file)):
        found = get_hf_file_metadata(hf_hub_url(name.repo, file, revision=name.revision))
        if not (found.commit_hash and found.etag and found.size is not None):
            raise Unreachable(f"the Hub does not say what {file} of {name.repo} is.")
        if not re.fullmatch(r"[\w-]{1,128}", found.etag + found.commit_hash, re.ASCII):
            raise Unreachable(f"the Hub's answer about {file} of {name.repo} makes no sense.")
        url = hf_hub_url(name.repo, file, revision=found.commit_hash)
    return HubFile(name.repo, file, name.revision, found.commit_hash, found.size, found.etag, url)


def choose(name: HubName, files: Mapping[str, int | None]) -> list[str]:
    """The file that a name means, with all its parts if it is split.

    Raises `ModelNotFoundError` with what there is: no such file or type, or several of it.
    """
    if name.file is not None:
        folder, _, last = name.file.rpartition("/")
        return [f"{folder}/{part}" if folder else part for part in names_of(last)]
    models: dict[str, int] = {}
    for file in files:
        path = PurePosixPath(file)
        if is_model(path.name) and not is_projector(path.name):
            first = str(path.with_name(first_of(path.name)))
            models[first] = models.get(first, 0) + (files[file] or 0)
    if not models:
        raise NoGGUFError(f"{name.repo} has no GGUF model.")
    labels: dict[str, list[str]] = {}
    for first in models:
        path = PurePosixPath(first)
        labels.setdefault(label_of(path.name) or label_of(path.parent.name), []).append(first)
    wanted = name.label
    if wanted is None:
        wanted = next((u for u in USUAL if u in labels), next(iter(labels)))
        if wanted not in USUAL and len(labels) > 1:
            raise ModelNotFoundError(f"{name.repo} has several models: {_shown(models)}.")
    found = labels.get(wanted, [])
    if not found:
        raise ModelNotFoundError(f"{name.repo} has no {wanted}; it has {_shown(models)}.")
    if len(found) > 1:
        several = {f: models[f] for f in found}
        raise ModelNotFoundError(
            f"{name.repo} has several {wanted or 'models'}: {_shown(several)}. Name the file."
        )
    folder, _, last = found[0].rpartition("/")
    return [f"{folder}/{part}" if folder else part for part in names_of(last)]


def among(text: str, here: Callable[[str], Mapping[str, T]]) -> T | None:
    """What a name means of the files that are ``here`` of its repository; None if it is no name of
    the Hub, or means none of them or several.

    ``org/repo`` means the only file, and a name with a revision none: files do not say theirs.

    >>> among("org/repo:Q8_0", lambda repo: {"some-Q8_0.gguf": 8, "some-Q4_0.gguf": 4})
    8
    """
    try:
        name = HubName.parse(text)
        if name.revision is not None:
            return None
        files = here(name.repo)
        if name.file is None and name.label is None and len(files) != 1:
            return None
        first = choose(name, dict.fromkeys(files))[0]
    except (InvalidRequestError, ModelNotFoundError):
        return None
    return files.get(first)


def projector_of(name: HubName, model: str, files: Mapping[str, int | None]) -> str:
    """The file that reads pictures for a model: in its folder or above, F16 if there are several.

    Raises `ModelNotFoundError`.
    """
    folder = PurePosixPath(model).parent
    order = {label: i for i, label in enumerate(PROJECTOR_ORDER)}
    found = [f for f in files if is_projector(PurePosixPath(f).name)]
    near_by = [f for f in found if PurePosixPath(f).parent == folder] or found
    if not near_by:
        raise ModelNotFoundError(f"{name.repo} has no mmproj file beside its models.")
    return min(near_by, key=lambda f: (order.get(label_of(PurePosixPath(f).name), 9), f))


def _shown(models: Mapping[str, int]) -> str:
    """The models of a repository as they can be named."""
    texts = [
        printable(first) + (f" ({gigabytes(size)})" if size else "")
        for first, size in sorted(models.items())
    ]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more
