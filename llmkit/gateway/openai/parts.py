"""The parts of messages in OpenAI's interfaces: text, pictures and sounds. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.media.parts import Detail, ImagePart, InputAudioPart
from llmkit.protocol.messages import Part

__all__ = ["ChatPart", "InputImagePart", "RefusalPart", "kept"]


class TextPart(Strict):
    type: Literal["text"]
    text: str

    def part(self, attached: Attached) -> Part:
        return self.text


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal

    def part(self, attached: Attached) -> Part:
        return self.refusal


ChatPart = Annotated[
    TextPart | RefusalPart | ImagePart | InputAudioPart, Field(discriminator="type")
]


class InputImagePart(Strict):
    """A picture in a response."""

    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: Detail | None = None

    def part(self, attached: Attached) -> Part:
        if self.image_url is None or self.file_id is not None:
            raise InvalidRequestError(
                "input: there are no uploaded files here; send a picture as image_url, a data: "
                "URL.",
                "input",
            )
        return attached.image(self.image_url, is_url=True, detail=self.detail)


def kept(part: dict[str, Any], attached: Attached) -> Part:
    """The part that was kept of an item in a response."""
    match part["type"]:
        case "input_image":
            return InputImagePart.model_validate(part).part(attached)
        case "input_audio":
            return InputAudioPart.model_validate(part).part(attached)
    return str(part.get("text") or part.get("refusal") or "")
