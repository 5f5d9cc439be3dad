"""What an image starts from: a picture, and a mask of what is drawn anew. Pure.

The files are a stranger's, and are read where an accident ends no more than one request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.media import pictures
from llmkit.protocol.images import Drawing

__all__ = ["Start"]

CLEAR = 128  # alpha below it


@dataclass(frozen=True, slots=True)
class Start:
    """``picture``: uint8 of shape (height, width, 3), in the size of the image; ``mask``: of shape
    (height, width, 1), 255 where it is drawn anew, or None for everywhere. ``steps`` are taken."""

    picture: np.ndarray
    mask: np.ndarray | None
    strength: float
    steps: int

    @classmethod
    def of(cls, options: Drawing, files: Mapping[str, bytes]) -> Start | None:
        """None if nothing is given. Raises `InvalidRequestError` for files that cannot be read."""
        if not options.image:
            return None
        assert options.steps is not None and options.strength is not None
        picture = _fitted(_read("image", files[options.image]), options)
        mask = None
        if options.mask:
            alpha = _read("mask", files[options.mask], pictures.alpha)
            clear = np.where(alpha < CLEAR, 255, 0).astype(np.uint8)
            if not clear.any():
                raise InvalidRequestError(
                    "mask: none of its pixels are clear, and clear ones are what is drawn anew. "
                    "Send a PNG with transparency.",
                    "mask",
                )
            mask = np.where(_fitted(clear, options) < CLEAR, 0, 255).astype(np.uint8)[..., None]
        return cls(picture, mask, options.strength, _taken(options.steps, options.strength))


def _read(name: str, data: bytes, read: Any = pictures.pixels) -> np.ndarray:
    try:
        found: np.ndarray = read(data)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}: {error}", name) from None
    return found


def _fitted(pixels: np.ndarray, options: Drawing) -> np.ndarray:
    """In the size of the image; what its shape leaves no room for is cut off on both sides."""
    from PIL import Image, ImageOps

    assert options.width is not None and options.height is not None
    size = options.width, options.height
    fitted = ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS)
    return np.ascontiguousarray(fitted)


def _taken(steps: int, strength: float) -> int:
    """The steps that stable-diffusion.cpp takes, which has the strength in 32 bits."""
    if strength >= 1:
        return steps
    return min(int(ctypes.c_float(ctypes.c_float(strength).value * steps).value), steps - 1) + 1
