"""What a model takes beside text. Pure."""

from __future__ import annotations

from llmkit.errors import InvalidRequestError
from llmkit.protocol import ModelDescription

__all__ = ["check_takes"]

WORDS = {"image": ("a picture", "images", "pictures"), "audio": ("a sound", "sound", "sounds")}


def check_takes(model: ModelDescription, kind: str, param: str = "messages") -> None:
    """Raises `InvalidRequestError` if a model takes none of this kind, image or audio."""
    if kind in model.inputs:
        return
    one, some, many = WORDS[kind]
    others = f" It takes {' and '.join(model.inputs)}." if model.inputs else ""
    raise InvalidRequestError(
        f"{param}: there is {one}, but the model {model.name} takes no {some}: it was loaded "
        f"without a projector (mmproj) for them.{others} Load it with projector=…, or leave {many} "
        "out.",
        param,
    )
