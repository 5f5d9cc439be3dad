"""OpenAI's body and answers for images. Pure."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.openai.schemas import Ignored
from llmkit.media import pictures
from llmkit.media.addresses import digest_of
from llmkit.protocol import Usage
from llmkit.protocol.images import IMAGE_FORMATS, MAX_IMAGES, Drawing, Picture, Step

__all__ = [
    "Asked",
    "ImageBody",
    "ImageEditBody",
    "completed",
    "image_usage",
    "images_object",
    "partial",
]

MAX_PARTIAL = 3
QUALITY = 90  # of JPEG and WebP
PATCH = 16 * 16  # pixels of a token, which each step costs
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
Word = Annotated[str, Field(max_length=40)]


class Asked(NamedTuple):
    """A drawing, the fields of its body that have no effect, and the files that it names."""

    drawing: Drawing
    ignored: list[str]
    files: dict[str, bytes]


class ImageBody(Ignored):
    """POST /v1/images/generations"""

    model: str = "default"
    prompt: str
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: str = "auto"
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    negative_prompt: str = ""
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: str = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque", "transparent"] = "auto"
    quality: Word | None = None
    style: Word | None = None
    moderation: Word | None = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL)] | None = None

    def drawing(self) -> Asked:
        """What is asked for. Raises `InvalidRequestError`."""
        if self.response_format == "url":
            raise InvalidRequestError(
                "response_format: images are not kept here, so they have no addresses; use "
                "b64_json.",
                "response_format",
            )
        if self.background == "transparent":
            raise InvalidRequestError(
                "background: these models have no transparency; use opaque or auto.", "background"
            )
        if self.output_format not in IMAGE_FORMATS:
            raise InvalidRequestError(
                f"output_format: {self.output_format:.20} is not supported; use png, webp or jpeg.",
                "output_format",
            )
        if self.partial_images and not self.stream:
            raise InvalidRequestError("partial_images needs stream.", "partial_images")
        ignored = [
            name
            for name in ("quality", "style", "moderation")
            if getattr(self, name) not in (None, "auto")
        ]
        if self.output_compression is not None and self.output_format == "png":
            ignored.append("output_compression")
        width, height = self._sides()
        form: Any = self.output_format
        quality = QUALITY if self.output_compression is None else self.output_compression
        drawing = Drawing(
            self.n or 1,
            width,
            height,
            self.seed,
            self.steps,
            self.cfg_scale,
            self.negative_prompt,
            form,
            quality,
            self.partial_images or 0,
        )
        return Asked(drawing, ignored, {})

    def _sides(self) -> tuple[int | None, int | None]:
        if self.size == "auto":
            return None, None
        found = SIZE.fullmatch(self.size)
        if found is None:
            raise InvalidRequestError(
                f"size: {self.size:.40} is neither auto nor a size such as 512x768.", "size"
            )
        return int(found[1]), int(found[2])


class ImageEditBody(ImageBody):
    """POST /v1/images/edits, as a form"""

    image: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]
    mask: Annotated[bytes, Field(json_schema_extra={"format": "binary"})] | None = None
    strength: float | None = None
    input_fidelity: Word | None = None

    def drawing(self) -> Asked:
        """Takes some tenths of a second for large files."""
        drawing, ignored, files = super().drawing()
        if self.input_fidelity is not None:
            ignored.append("input_fidelity")
        image = _added(files, "image", self.image)
        mask = "" if self.mask is None else _added(files, "mask", self.mask)
        started = replace(drawing, image=image, mask=mask, strength=self.strength)
        return Asked(started, ignored, files)


def _added(files: dict[str, bytes], name: str, data: bytes) -> str:
    """The digest of a file, which is added to the others. Raises `InvalidRequestError` for one that
    is none of a picture."""
    try:
        pictures.facts(data)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}: {error}", name) from None
    files[digest := digest_of(data)] = data
    return digest


def images_object(
    pictures: Sequence[Picture], drawing: Drawing, usage: Usage, created: int
) -> Iterator[bytes]:
    """The answer as JSON in parts; each image names the seed that gives it again.

    A part for each image, made when it is asked for: as one they may be 100 MB.
    """
    head = {
        "created": created,
        "background": "opaque",
        "output_format": drawing.format,
        "size": f"{pictures[0].width}x{pictures[0].height}" if pictures else "auto",
        "seed": pictures[0].seed if pictures else drawing.seed,
        "usage": _usage(usage.prompt_tokens, usage.completion_tokens),
    }
    yield json.dumps(head).encode()[:-1] + b', "data": ['
    for number, picture in enumerate(pictures):
        comma = b", " if number else b""
        text = base64.b64encode(picture.data)
        yield b'%s{"b64_json": "%s", "seed": %d}' % (comma, text, picture.seed)
    yield b"]}"


def partial(step: Step, index: int, drawing: Drawing, created: int) -> dict[str, Any]:
    """A preview; ``index`` counts those of its image."""
    size = "auto" if drawing.width is None else f"{drawing.width}x{drawing.height}"
    return {
        "type": f"{_kind(drawing)}.partial_image",
        "b64_json": _text(step.preview),
        "partial_image_index": index,
        "image_index": step.index,
        "step": step.step,
        "steps": step.steps,
        **_facts(size, drawing, created),
    }


def completed(
    picture: Picture, drawing: Drawing, usage: dict[str, Any], created: int
) -> dict[str, Any]:
    """A finished image."""
    return {
        "type": f"{_kind(drawing)}.completed",
        "b64_json": _text(picture.data),
        "image_index": picture.index,
        "seed": picture.seed,
        **_facts(f"{picture.width}x{picture.height}", drawing, created),
        "usage": usage,
    }


def image_usage(picture: Picture, steps: int, counted: int, whole: Usage | None) -> dict[str, Any]:
    """Of an image in a stream: the last has the prompt's tokens, and what was not ``counted``."""
    if whole is None:
        return _usage(0, picture.width * picture.height // PATCH * steps)
    return _usage(whole.prompt_tokens, whole.completion_tokens - counted)


def _kind(drawing: Drawing) -> str:
    return "image_edit" if drawing.image else "image_generation"


def _facts(size: str, drawing: Drawing, created: int) -> dict[str, Any]:
    return {
        "created_at": created,
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": drawing.format,
    }


def _usage(num_read: int, num_made: int) -> dict[str, Any]:
    return {
        "input_tokens": num_read,
        "output_tokens": num_made,
        "total_tokens": num_read + num_made,
        "input_tokens_details": {"text_tokens": num_read, "image_tokens": 0},
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
