"""Pixels to image files. Pure."""

from __future__ import annotations

import io
from typing import Any

from llmkit.protocol.images import Drawing

__all__ = ["encoded"]

PREVIEW_QUALITY = 75


def encoded(
    pixels: bytes, width: int, height: int, options: Drawing, facts: dict[str, str] | None = None
) -> bytes:
    """RGB ``pixels`` as a file in the format of ``options``; a PNG also tells the ``facts``.

    Without facts it is a preview, quick to make: enlarged to the size that is asked for, or a small
    JPEG.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image = Image.frombytes("RGB", (width, height), pixels)
    settings: dict[str, Any] = {}
    kind = options.format
    if facts is None and options.small_previews:
        kind = "jpeg"
    elif facts is None and options.width is not None and options.height is not None:
        image = image.resize((options.width, options.height), Image.Resampling.BICUBIC)
    if kind == "png":
        settings["compress_level"] = 1 if facts is None else 6
        if facts is not None:
            settings["pnginfo"] = told = PngInfo()
            for name, value in facts.items():
                told.add_itxt(name, value)
    else:
        settings["quality"] = PREVIEW_QUALITY if facts is None else options.quality
    file = io.BytesIO()
    image.save(file, kind.upper(), **settings)
    return file.getvalue()
