"""Pictures and sounds as people have them in Python, to files. Any thread.

Nothing is imported for a kind of object that is not there.
"""

from __future__ import annotations

import io
import sys
import wave
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import InvalidRequestError
from llmkit.media import pictures, sounds
from llmkit.media.addresses import digest_of, from_data_url, is_data_url
from llmkit.media.waveforms import check_rate, floats, pcm16
from llmkit.protocol import Media
from llmkit.protocol.messages import Part

__all__ = ["attached", "picture_file", "sound_file"]

PICTURES = (
    "a PIL image, a path, the bytes of a file, a numpy array (height, width, 3) of 0 to 255 or "
    "0.0 to 1.0, or a matplotlib figure"
)
OVERSHOOT = 0.01  # of the whole: arithmetic and resampling leave 1.0000001, or -0.003
NO_SHARE = 2.0  # what is below may be shares that were sharpened
SOUNDS = (
    "a path, the bytes of a file, or samples with their rate: (array, 16000), floats from -1 to 1 "
    "or integers"
)


def attached(files: dict[str, bytes], images: Any = (), sounds: Any = ()) -> tuple[Part, ...]:
    """Parts of a message for pictures and sounds, whose files are added to ``files``.

    One may be given alone. Raises `InvalidRequestError`.
    """
    parts: list[Part] = []
    for kind, given, read in (("image", images, picture_file), ("audio", sounds, sound_file)):
        for each in _listed(given):
            data = read(each)
            files[digest := digest_of(data)] = data
            parts.append(Media(digest, "image" if kind == "image" else "audio"))
    return tuple(parts)


def _listed(given: Any) -> Sequence[Any]:
    """A list of things, or a thing alone: a pair of samples and rate is one."""
    is_pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Real)
    return given if isinstance(given, list | tuple) and not is_pair else [given]


def picture_file(given: Any, param: str = "images") -> bytes:
    """A picture as the bytes of a file. A file stays as it is; all else becomes a PNG.

    Raises `InvalidRequestError` for what is no picture; its message begins with ``param``.

    >>> pictures.facts(picture_file(np.zeros((2, 3, 3), np.uint8)))
    Facts(format='PNG', width=3, height=2)
    """
    data = _file(given, param)
    if data is None and hasattr(given, "savefig"):  # a figure
        file = io.BytesIO()
        given.savefig(file, format="png", bbox_inches="tight")
        data = file.getvalue()
    pillow = sys.modules.get("PIL.Image")
    if data is None and pillow is not None and isinstance(given, pillow.Image):
        data = _of_pillow(given, param)
    if data is None and hasattr(given, "_repr_png_"):  # IPython.display.Image
        shown = given._repr_png_()
        shown = shown[0] if isinstance(shown, tuple) else shown
        data = shown if isinstance(shown, bytes) else None
    if data is None and hasattr(given, "__array__"):
        data = pictures.png(_pixels(np.asarray(given), param))
    if data is None:
        raise InvalidRequestError(
            f"{param}: {type(given).__name__} is no picture; give {PICTURES}.", param
        )
    pictures.facts(data)
    return data


def _of_pillow(image: Any, param: str) -> bytes:
    image, file = pictures.upright(image), io.BytesIO()  # a PNG keeps no notes of a camera
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would cut these off at 0 and 255
        return _of_numbers(np.asarray(image), image.info.get("transparency"), param)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.save(file, "PNG")
    return file.getvalue()


def _of_numbers(grey: np.ndarray, clear: Any, param: str) -> bytes:
    """A file of 16 bits of grey, where that is what these numbers are, else of 8. ``clear`` is the
    one value that is transparent, if it is a number."""
    is_deep = grey.dtype.itemsize == 2
    if grey.dtype.kind == "i" and grey.size:
        is_deep = grey.min() >= 0 and 255 < grey.max() < 1 << 16
    if not is_deep or not grey.size:
        return pictures.png(_pixels(grey, param))
    from PIL import Image

    file = io.BytesIO()
    options = {"transparency": clear} if isinstance(clear, int) else {}
    Image.fromarray(grey.astype(np.uint16)).save(file, "PNG", **options)
    return file.getvalue()


def _pixels(array: np.ndarray, param: str) -> np.ndarray:
    """uint8 pixels from the usual arrays. Raises `InvalidRequestError`."""
    has_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not has_shape or not array.size:
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = " Channels come last: np.moveaxis(array, 0, -1)."
        raise InvalidRequestError(
            f"{param}: an array of shape {array.shape} is no picture; it must be (height, width), "
            f"or (height, width, 3) or (height, width, 4).{hint}",
            param,
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
        raise InvalidRequestError(f"{param}: {array.dtype} are no pixels.", param)
    low, high = float(array.min()), float(array.max())
    is_float = np.issubdtype(array.dtype, np.floating)
    is_share = is_float and high <= 1.0 + OVERSHOOT
    if is_float and 1.0 + OVERSHOOT < high < NO_SHARE:
        raise InvalidRequestError(
            f"{param}: the numbers of an array go from {low:g} to {high:g}: too high for 0.0 to "
            "1.0, and nearly black as 0 to 255. Give np.clip(array, 0, 1) or "
            "array.astype(np.uint8).",
            param,
        )
    most = 1.0 if is_share else 255.0
    beyond = OVERSHOOT * most if is_float else 0.0
    if not -beyond <= low <= high <= most + beyond:  # also NaN
        raise InvalidRequestError(
            f"{param}: the numbers of an array go from {low:g} to {high:g}; pixels go from 0 to "
            "255, or from 0.0 to 1.0.",
            param,
        )
    return np.asarray(np.rint(np.clip(array, 0.0, most) * (255.0 / most)), np.uint8)


def sound_file(given: Any) -> bytes:
    """A sound as the bytes of a file. A file stays as it is; samples become a WAV.

    Raises `InvalidRequestError` for what is no sound.
    """
    data = _file(given, "sounds")
    if data is None and hasattr(given, "samples") and hasattr(given, "rate"):
        given = (given.samples, given.rate)  # what `TextToSpeech.say` gives
    if data is None and isinstance(given, tuple) and len(given) == 2:
        data = _wav(np.asarray(given[0]), given[1])
    if data is None:
        raise InvalidRequestError(
            f"sounds: {type(given).__name__} is no sound; give {SOUNDS}.", "sounds"
        )
    sounds.check(data)
    return data


def _wav(samples: np.ndarray, rate: Any) -> bytes:
    if samples.ndim != 1:
        raise InvalidRequestError(f"sounds: give {SOUNDS}; samples have one channel.", "sounds")
    known = check_rate(rate, "sounds")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(known)
        writer.writeframes(pcm16(floats(samples, "sounds")).tobytes())
    return file.getvalue()


def _file(given: Any, param: str) -> bytes | None:
    """What is a file already, or names one."""
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    if isinstance(given, str) and is_data_url(given):
        return from_data_url(given)
    if isinstance(given, str) and "://" in given[:12]:
        raise InvalidRequestError(
            f"{param}: nothing is fetched from {given:.60}; download it, and give the file.", param
        )
    if isinstance(given, str | PathLike):
        path = Path(given).expanduser()
        try:
            if path.stat().st_size > sounds.MAX_BYTES:
                raise InvalidRequestError(f"{param}: {path.name} is too large a file.", param)
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{param}: {path} cannot be read: {error}.", param) from None
    return None
