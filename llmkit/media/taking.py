"""What a model takes beside text. Pure."""

from __future__ import annotations

from collections.abc import Collection

from llmkit.errors import InvalidRequestError
from llmkit.protocol import ModelDescription

__all__ = ["MAX_MEDIA", "check_takes", "refusal"]

MAX_MEDIA = 48  # pictures and sounds that one request is told
WORDS = {"image": ("images", "pictures"), "audio": ("sound", "sounds")}


def check_takes(model: ModelDescription, kind: str, param: str = "messages") -> None:
    """Raises `InvalidRequestError` if a model takes none of this kind, image or audio."""
    if kind not in model.senses:
        raise refusal(kind, model.senses, param, f"the model {model.name}", param)


def refusal(
    kind: str, inputs: Collection[str], place: str, who: str = "this model", param: str = "messages"
) -> InvalidRequestError:
    """Why a model refuses what is at a place of a request, and what to do.

    >>> print(str(refusal("image", (), "messages"))[:40])
    messages: this model takes no images: it
    """
    some, many = WORDS[kind]
    taken = " and ".join(WORDS[each][0] for each in inputs if each in WORDS)
    others = f" It takes {taken}." if taken else ""
    return InvalidRequestError(
        f"{place}: {who} takes no {some}: it was loaded without a projector (mmproj) for them."
        f"{others} Load it with projector=FILE, or leave {many} out.",
        param,
    )
