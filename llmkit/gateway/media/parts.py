"""Parts of a message that hold a file, as chats and sessions write them. Pure."""

from __future__ import annotations

from typing import Literal

from llmkit.gateway.bodies import Strict
from llmkit.gateway.media.attached import Attached
from llmkit.protocol.messages import Media

__all__ = ["Detail", "ImagePart", "InputAudioPart"]

Detail = Literal["auto", "low", "high", "original"]


class ImageAddress(Strict):
    url: str
    detail: Detail | None = None


class ImagePart(Strict):
    """A picture in a chat."""

    type: Literal["image_url"]
    image_url: str | ImageAddress

    def part(self, attached: Attached) -> Media:
        given = self.image_url
        if isinstance(given, str):
            return attached.image(given, is_url=True)
        return attached.image(given.url, is_url=True, detail=given.detail)


class Sound(Strict):
    """``format`` is what the file itself says, whatever is given."""

    data: str
    format: str | None = None


class InputAudioPart(Strict):
    """A sound, in a chat or a response."""

    type: Literal["input_audio"]
    input_audio: Sound

    def part(self, attached: Attached) -> Media:
        return attached.audio(self.input_audio.data)
