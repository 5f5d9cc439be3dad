"""Picture files to pixels, by Pillow. The bytes are a stranger's: nothing in them is believed.

Header, size and number of bytes are looked at before Pillow sees the file; then it decodes in the
one format that was recognised. What is called here takes up to a second: never on an event loop.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.media.headers import FORMATS, Facts, facts_of

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "LOW_SIDE",
    "MAX_BYTES",
    "MAX_PIXELS",
    "alpha",
    "facts",
    "pixels",
    "png",
    "reduced",
    "size",
    "thumbnail",
    "upright",
]

MAX_BYTES = 20_000_000  # of a file
MAX_PIXELS = 40_000_000
MAX_SIDE = 32_768
MAX_SCANS = 100  # of a progressive JPEG: each goes over the whole picture
COLOURS = 256
LOW_SIDE = 512  # pixels, for what is to be looked at in low detail
READABLE = f"Supported formats: {', '.join(FORMATS)}."
# EXIF's orientations: what Pillow calls the way back.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112
# The header of a JPEG's scan: its marker, its length, and the number of its components, as decoders
# check them. A video behind the picture, as phones put it there, has the marker alone by chance.
_SCAN = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")


def facts(data: bytes) -> Facts:
    """Format and size of a picture file, by its header; nothing is decoded.

    Raises `InvalidRequestError` for what is not readable, more than 20 MB or 40 megapixels.

    >>> import numpy as np
    >>> facts(png(np.zeros((2, 3), np.uint8)))
    Facts(format='PNG', width=3, height=2)
    """
    if not data:
        raise _refused("The picture is empty.")
    if len(data) > MAX_BYTES:
        raise _refused(
            f"The picture has {len(data) / 1e6:.1f} MB; the limit is {MAX_BYTES // 1_000_000} MB. "
            "Send it smaller: models see far fewer pixels."
        )
    try:
        found = facts_of(data)
    except ValueError as error:
        raise _refused(f"The picture cannot be read: {error}.") from error
    if found is None:
        raise _refused(f"{_other(data)} {READABLE}")
    _check_size(found.width, found.height)
    if found.format == "JPEG" and any(islice(_SCAN.finditer(data), MAX_SCANS, None)):
        raise _refused(
            f"The picture comes in more than {MAX_SCANS} scans. Save it as a plain JPEG."
        )
    return found


def pixels(data: bytes) -> np.ndarray:
    """The picture as uint8 (height, width, 3), upright, and on white where it is transparent.

    Of an animation it is the first frame. Raises `InvalidRequestError` as `facts` does, and for
    a file that is cut off or broken.
    """
    import numpy as np

    return np.asarray(_decoded(data))


def size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture when it is upright; nothing is decoded. Raises as `facts`
    does."""
    from PIL import Image

    found = facts(data)
    sides = found.width, found.height
    try:
        with Image.open(io.BytesIO(data), formats=[found.format.upper()]) as image:
            is_turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # it will be told when the picture is read
        return sides
    return sides[::-1] if is_turned else sides


def alpha(data: bytes) -> np.ndarray:
    """How solid each pixel is, from 0 (clear) to 255: uint8 (height, width). Raises as `pixels`
    does."""
    import numpy as np

    return np.asarray(_decoded(data, shown=_alpha))


def reduced(data: bytes, side: int) -> bytes:
    """The same picture in a file, at most ``side`` pixels wide and high.

    A file that is small enough comes back as it is. Raises `InvalidRequestError` as `pixels` does.
    """
    found = facts(data)
    if max(found.width, found.height) <= side:
        return data
    return _written(_smaller(_decoded(data, side), side))


def thumbnail(data: bytes, side: int = 112) -> bytes:
    """A PNG of some kilobytes, to be shown beside a text. Raises as `pixels` does."""
    image = _smaller(_decoded(data, side), side)
    return _written(image.quantize(COLOURS))


def png(pixels: np.ndarray) -> bytes:
    """uint8 (height, width), or with 1, 3 or 4 channels behind, as a PNG file."""
    from PIL import Image

    return _written(Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _decoded(
    data: bytes, side: int | None = None, shown: Callable[[Any], Any] | None = None
) -> Any:
    """An RGB image of Pillow's, or what ``shown`` makes of it; with a ``side``, possibly smaller,
    but not smaller than that."""
    import PIL
    from PIL import Image

    found = facts(data)
    try:
        with Image.open(io.BytesIO(data), formats=[found.format.upper()]) as image:
            _check_size(*image.size)  # frames may reach further than their GIF
            if side is not None:
                image.draft("RGB", (side, side))
            image.load()
            return (shown or _rgb)(upright(image))
    except InvalidRequestError:
        raise
    except MemoryError as error:
        raise _refused("The picture needs more memory than there is. Send it smaller.") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, KeyError…
        if found.format == "AVIF" and "AVIF" not in Image.OPEN:
            raise _refused(
                f"The picture is AVIF, which this Pillow ({PIL.__version__}) cannot read."
            ) from error
        # Pillow names the object that it read from, with its place in memory.
        said = "" if isinstance(error, PIL.UnidentifiedImageError) else f" ({error!s:.120})"
        raise _refused(
            f"The picture is cut off or broken: as {found.format} it cannot be read{said}."
        ) from error


def upright(image: Any) -> Any:
    """An image of Pillow's as its camera's notes say that it is to be seen."""
    from PIL import Image

    try:
        way = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken notes of a camera are no reason to refuse its picture
        return image
    return image if way is None else image.transpose(Image.Transpose[way])


def _rgb(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = np.asarray(image)
        clear = image.info.get("transparency")  # the one value that is
        seen = np.where(grey == clear, 0xFFFF, grey) if isinstance(clear, int) else grey
        return Image.fromarray((seen >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    white = Image.new("RGB", clear.size, "white")
    white.paste(clear, mask=clear.getchannel("A"))
    return white


def _alpha(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _smaller(image: Any, side: int) -> Any:
    """Fits a square of this side, keeping the proportions."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.resize((width, height), reducing_gap=3.0)


def _written(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _refused(
            f"The picture has {width} × {height} pixels; the limit is {MAX_PIXELS // 1_000_000} "
            f"megapixels and {MAX_SIDE:,} pixels per side. Send it smaller: models see far fewer."
        )


def _other(data: bytes) -> str:
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<"):
        return "The picture is SVG, HTML or other text, which cannot be read."
    if data[4:8] == b"ftyp":
        return "The picture is a HEIC or video file."
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "The picture is a TIFF file."
    return "This is not a picture format llmkit can read."


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError(why, "messages")
