"""Images: what is asked of a model that draws, and the seam that such models implement.

Standard library only. A model that draws (an `ImageGenerator`) is behind an `EngineClient` like any
other. Its requests are `GenerationRequest`s with a `Drawing`, whose prompt says what is to be seen,
and whose media have the files that it starts from; the text of their streams is lines: `Step`s and
`Picture`s.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from llmkit.protocol.sampling import check, check_integer, check_number

__all__ = [
    "IMAGE_FORMATS",
    "MAX_IMAGES",
    "MAX_PREVIEWS",
    "MAX_PROMPT_CHARS",
    "MAX_STEPS",
    "MAX_WORK",
    "Drawing",
    "ImageFormat",
    "ImageGenerator",
    "ImageLines",
    "Picture",
    "Step",
]

ImageFormat = Literal["png", "webp", "jpeg"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "webp", "jpeg")
MAX_IMAGES = 10
MAX_STEPS = 150
MAX_WORK = 300 * 1024 * 1024  # pixels of all steps of a request
MAX_PREVIEWS = MAX_STEPS  # one for each step
MAX_PROMPT_CHARS = 4000
MAX_SEED = 2**53 - 1  # of the last image: what JSON's readers hold exactly
SIDE, MIN_SIDE, MAX_SIDE = 64, 64, 2048
MIN_STRENGTH = 0.01


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a prompt is drawn; what is None is the model's own.

    ``n`` images of ``width`` by ``height`` pixels, multiples of 64. The same ``seed`` gives the
    same image, and image ``i`` has the seed ``seed + i``, at most 2**53 - 1. ``steps`` of
    denoising; ``cfg_scale``: how closely the prompt is followed; ``negative_prompt``: what is not
    to be seen. ``format`` with ``quality`` 0 (smallest file) to 100 (best image), for JPEG and
    WebP. ``previews``: how many steps of each image are shown, spread evenly; ``small_previews``:
    as they come, as JPEGs.

    ``image`` is the digest of a picture to start from, and ``strength`` how far the result may be
    from it, from 0.01 to 1 (as far as without it); lower values take fewer steps. ``mask`` is the
    digest of one of the same size, whose clear pixels say what is drawn anew.
    """

    n: int = 1
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    negative_prompt: str = ""
    format: ImageFormat = "png"
    quality: int = 90
    previews: int = 0
    small_previews: bool = False
    image: str = ""
    mask: str = ""
    strength: float | None = None

    def __post_init__(self) -> None:
        check_integer(self.n, "n", 1, MAX_IMAGES)
        check(
            (self.width is None) == (self.height is None),
            "size",
            "needs both a width and a height.",
        )
        for side in (self.width, self.height):
            fine = side is None or (
                isinstance(side, int) and MIN_SIDE <= side <= MAX_SIDE and side % SIDE == 0
            )
            check(
                fine,
                "size",
                f"{self.width}x{self.height}: sides are multiples of {SIDE} from {MIN_SIDE} to "
                f"{MAX_SIDE}, such as 512x512 or 1024x768.",
            )
        if self.seed is not None:
            check_integer(self.seed, "seed", 0, MAX_SEED - (self.n - 1))
        if self.steps is not None:
            check_integer(self.steps, "steps", 1, MAX_STEPS)
        if self.cfg_scale is not None:
            check_number(self.cfg_scale, "cfg_scale", 0, 30)
        check(
            isinstance(self.negative_prompt, str) and len(self.negative_prompt) <= MAX_PROMPT_CHARS,
            "negative_prompt",
            f"must be a string of at most {MAX_PROMPT_CHARS} characters.",
        )
        check(
            self.format in IMAGE_FORMATS,
            "output_format",
            f"{self.format!r:.20} is not supported; use png, webp or jpeg.",
        )
        check_integer(self.quality, "output_compression", 0, 100)
        check_integer(self.previews, "partial_images", 0, MAX_PREVIEWS)
        if self.strength is not None:
            check_number(self.strength, "strength", MIN_STRENGTH, 1)
        for name in ("mask", "strength"):
            check(bool(self.image) or not getattr(self, name), name, "needs an image.")


@dataclass(frozen=True, slots=True)
class Step:
    """A step of image ``index``: ``step`` of ``steps`` are done, 0 once it has begun. ``preview``
    is what can be seen by now, as a file of the format that was asked for, or empty."""

    index: int
    step: int
    steps: int
    preview: bytes = b""


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished image as a file, and the seed that gives it again."""

    index: int
    seed: int
    width: int
    height: int
    data: bytes


class ImageGenerator(Protocol):
    """A model that draws. One thread at a time."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its images by default."""
        ...

    @property
    def steps(self) -> int:
        """Steps by default."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Of a `ModelDescription`: its architecture, its device."""
        ...

    @property
    def refusal(self) -> str | None:
        """Why it cannot start from a picture; None if it can, or as long as nobody knows."""
        ...

    @property
    def load_s(self) -> float:
        """Seconds that it took to load: so long it takes again after a request that was left."""
        ...

    def check_room(self, width: int, height: int) -> None:
        """Raises `InvalidRequestError` if there is no memory for an image of this size."""
        ...

    def images(
        self,
        prompt: str,
        options: Drawing,
        files: Mapping[str, bytes],
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step | Picture]:
        """Each image's steps from 0 on, then its picture. ``options`` have all but the scales, and
        ``files`` what they name.

        Once ``is_over`` says so, the rest is left out, within a second. Raises `EngineError`,
        `InvalidRequestError` for a file that cannot be read, and what ``check_room`` raises.
        """
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class ImageLines:
    """The text of an image stream: written by an engine, read piece by piece by its caller.

    >>> lines = ImageLines()
    >>> text = ImageLines.of(Step(0, 1, 20))
    >>> list(lines.read(text[:9])), list(lines.read(text[9:]))
    ([], [Step(index=0, step=1, steps=20, preview=b'')])
    """

    def __init__(self) -> None:
        self._parts: list[str] = []

    @staticmethod
    def of(event: Step | Picture) -> str:
        """An event as a line of JSON, files in base64."""
        data = asdict(event)
        for name, value in data.items():
            if isinstance(value, bytes):
                data[name] = base64.b64encode(value).decode()
        return json.dumps(data) + "\n"

    def read(self, text: str) -> Iterator[Step | Picture]:
        """The events of all lines that are whole."""
        *lines, rest = text.split("\n")
        for line in lines:
            whole = "".join([*self._parts, line])
            self._parts.clear()
            yield _event(whole)
        self._parts.append(rest)


def _event(line: str) -> Step | Picture:
    data: dict[str, Any] = json.loads(line)
    if "step" in data:
        return Step(**{**data, "preview": base64.b64decode(data["preview"])})
    return Picture(**{**data, "data": base64.b64decode(data["data"])})
