"""What drawing looks like in a notebook: steps with a preview, and several images side by side."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from llmkit.notebook import charts
from llmkit.notebook.progress import Progress
from llmkit.protocol.images import Picture, Step

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "LiveImages", "image_of"]

WIDTH = 256  # of a preview, in the browser's pixels
THUMBNAIL = 512  # the longer side of each of several images


class LiveImages(Progress):
    """Shows the steps of ``n`` images, and what can be seen by now."""

    def __init__(self, name: str, n: int) -> None:
        super().__init__(name, n, keep=False)
        self._name, self._preview = name, b""
        self._seeds: list[int] = []

    def add(self, event: Step | Picture) -> None:
        if isinstance(event, Picture):
            self._seeds.append(event.seed)
            return
        self._preview = event.preview or self._preview
        self.update(event.index + event.step / event.steps, f"step {event.step} of {event.steps}")

    def ending(self, seconds: float, *, finished: bool) -> str:
        if not finished:
            return f"{self._name}: stopped after {seconds:.1f} s"
        what = "seed" if len(self._seeds) == 1 else "seeds"
        return f"{self._name}: drawn in {seconds:.1f} s, {what} {', '.join(map(str, self._seeds))}"

    def below(self) -> str:
        if not self._preview:
            return ""
        data = base64.b64encode(self._preview).decode()
        return f'<img alt="preview" width="{WIDTH}" src="data:image/jpeg;base64,{data}"/>'


class Images(list["Image"]):
    """Several images, which a notebook shows side by side."""

    def _repr_html_(self) -> str:
        shown = "".join(_figure(image) for image in self)
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{shown}</div>'


def image_of(picture: Picture) -> Image:
    """A finished image, with its ``info``: ``seed`` (a number), ``prompt``, ``steps`` and so on."""
    from PIL import Image as images

    image = images.open(io.BytesIO(picture.data))
    image.load()
    image.info["seed"] = picture.seed
    return image


def _figure(image: Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    label = escape(f"seed {image.info.get('seed', '')}")
    return (
        f'<figure style="margin:0"><img alt="{label}" src="data:image/png;base64,{data}"/>'
        f'<figcaption style="color:{charts.MUTED}">{label}</figcaption></figure>'
    )
