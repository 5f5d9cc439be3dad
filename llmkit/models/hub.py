"""Files on the Hugging Face Hub, named ``org/repo:file.gguf`` (also ``org/repo@revision:...``).

huggingface_hub downloads, caches and resumes them.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.errors import ModelNotFoundError
from llmkit.models.splits import names_of

__all__ = ["download", "is_hub_name"]

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?:(?P<file>[\w./ -]+\.gguf)")


def is_hub_name(text: str) -> bool:
    """Whether this is spelled like a file on the Hub."""
    return NAME.fullmatch(text) is not None


def download(name: str) -> Path:
    """The local file, downloaded if missing; of a split model all files, and the first is returned.

    Raises `ModelNotFoundError`: no such repository, revision or file, a gated repository without a
    token, or the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = NAME.fullmatch(name)
    assert match is not None
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        folder, _, last = file.rpartition("/")
        files = [
            Path(hf_hub_download(repo, f"{folder}/{part}" if folder else part, revision=revision))
            for part in names_of(last)
        ]
        return files[0]
    except GatedRepoError:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its terms on the Hub, then log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"there is no repository {repo} on the Hub, or it is private "
            "(log in with `hf auth login`)."
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}.") from None
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{file} of {repo} is not on this machine, and the Hub cannot be reached: "
            f"{error.__cause__ or error}"
        ) from None
    except EntryNotFoundError:
        raise ModelNotFoundError(f"{repo} has no file {file!r}{_files(repo, revision)}") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{name} could not be downloaded from the Hub: {error}") from None


def _files(repo: str, revision: str | None) -> str:
    from huggingface_hub import model_info

    try:
        names = [
            f.rfilename
            for f in model_info(repo, revision=revision).siblings or ()
            if f.rfilename.endswith(".gguf")
        ]
    except Exception:  # the list only improves the message
        return "."
    return f"; it has {', '.join(names[:10])}." if names else "; it has no GGUF file."
