"""The handle of models that draw: `TextToImage`. As `LLM` is for models that write."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmkit.errors import EngineError, InvalidRequestError, ModelUnloadedError
from llmkit.handle import Handle
from llmkit.media.addresses import digest_of
from llmkit.media.given import picture_file
from llmkit.notebook.drawing import Images, LiveImages, image_of
from llmkit.protocol import GenerationRequest
from llmkit.protocol.images import MAX_PREVIEWS, Drawing, ImageLines, Picture
from llmkit.sessions.running import Interrupted, new_id

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TextToImage"]


class TextToImage(Handle):
    """A model that draws, in a process of its own.

    >>> sd = llmkit.load("sd-turbo.safetensors")                    # doctest: +SKIP
    >>> sd.generate("a lighthouse at dusk, oil on canvas", seed=7)  # doctest: +SKIP
    """

    last: Images | None = None  # the latest images; after an interrupt those that were finished

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        n: int = 1,
        size: str | tuple[int, int] | None = None,
        seed: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
    ) -> Image | Images:
        """Draw a prompt: a PIL image, or for ``n`` above 1 a list of them.

        size: width and height, ``"768x512"`` or ``(768, 512)``, multiples of 64; by default what
            the model was made for.
        seed: the same gives the same image; by default a new one. ``image.info`` has it.
        steps: of denoising, 1 to 150: more take longer and show more detail.
        cfg_scale: how closely the prompt is followed, 0 to 30.
        negative_prompt: what is not to be seen.
        image: a picture to start from: a PIL image, a path, bytes, an array or a figure. The
            result has its shape, unless ``size`` says another.
        mask: a picture of the same size, whose transparent pixels say what is drawn anew; by
            default all of it.
        strength: how far the result may be from ``image``, from 0.01 to 1; by default 0.75.

        A notebook shows the steps with a preview. ■ ends the work at once and gives the memory
        back; the next call loads the model again. Raises `InvalidRequestError`, `EngineError` if
        the process that draws has ended, and `ModelUnloadedError` after an ``unload()`` meanwhile.
        """
        width, height = _sides(size)
        files: dict[str, bytes] = {}
        drawing = Drawing(
            n,
            width,
            height,
            seed,
            steps,
            cfg_scale,
            negative_prompt,
            previews=MAX_PREVIEWS,
            small_previews=True,
            image=_added(files, image, "image"),
            mask=_added(files, mask, "mask"),
            strength=strength,
        )
        request = GenerationRequest(new_id(), prompt=prompt, drawing=drawing, media=files)
        live, images, finished = LiveImages(self.name, n), Images(), False
        self.last = images
        try:
            with self.engine.submit(request) as stream:
                lines = ImageLines()
                for event in (event for text in stream for event in lines.read(text)):
                    live.add(event)
                    if isinstance(event, Picture):
                        images.append(image_of(event))
            if len(images) < n:
                raise (
                    ModelUnloadedError("the model was unloaded during this request")
                    if self.closed
                    else EngineError("the request was ended before all images were finished")
                )
            finished = True
        except KeyboardInterrupt:
            raise Interrupted(
                f"drawing was stopped; what was finished is in .last of {self.name!r}"
            ) from None
        finally:
            live.close(finished=finished)
        return images[0] if n == 1 else images

    def __repr__(self) -> str:
        what = "unloaded" if self.closed else self._description.image_size
        return f"TextToImage({self.name!r}, {what})"


def _added(files: dict[str, bytes], picture: Any, name: str) -> str:
    """The digest of a picture, whose file is added to ``files``; empty if there is none."""
    if picture is None:
        return ""
    data = picture_file(picture, name)
    files[digest := digest_of(data)] = data
    return digest


def _sides(size: str | tuple[int, int] | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    if isinstance(size, str) and (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", size.strip())):
        return int(found[1]), int(found[2])
    if isinstance(size, tuple) and len(size) == 2:
        return size
    raise InvalidRequestError(f'size is {size!r:.40}; write "768x512" or (768, 512).', "size")
