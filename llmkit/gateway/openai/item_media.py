"""Pictures and sounds in the items of stored responses: each is kept apart, once. Pure.

An item that is kept names them by their digest; what a caller sees of it has them in it again.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.gateway.media.attached import KEPT, Attached
from llmkit.gateway.openai.parts import kept
from llmkit.media.addresses import data_url
from llmkit.protocol import Media

__all__ = ["apart", "digests_of", "together"]

Item = dict[str, Any]


def apart(items: Sequence[Item], attached: Attached) -> list[Item]:
    """The items as they are kept; what they hold was ``attached``, and is read."""

    def named(part: Item) -> Item:
        media = kept(part, attached)
        assert isinstance(media, Media)
        return _with(part, KEPT + media.digest)

    return [_changed(item, named) for item in items]


def digests_of(items: Sequence[Item]) -> list[str]:
    """What the items hold that is kept apart."""
    parts = [part for item in items for part in _parts(item) if _is_media(part)]
    return [place.removeprefix(KEPT) for p in parts if (place := _place(p)).startswith(KEPT)]


def together(items: Sequence[Item], files: Mapping[str, bytes]) -> list[Item]:
    """The items with their files in them; those that are gone stay names."""

    def whole(part: Item) -> Item:
        data = files.get(_place(part).removeprefix(KEPT))
        if data is None:
            return part
        is_image = part["type"] == "input_image"
        return _with(part, data_url(data) if is_image else base64.b64encode(data).decode())

    return [_changed(item, whole) for item in items]


def _parts(item: Item) -> list[Item]:
    content = item.get("content", item.get("output"))
    return content if isinstance(content, list) else []


def _is_media(part: Item) -> bool:
    return part.get("type") in ("input_image", "input_audio")


def _place(part: Item) -> str:
    """An address, or data in base64."""
    place = part["image_url"] if part["type"] == "input_image" else part["input_audio"]["data"]
    return str(place or "")


def _with(part: Item, place: str) -> Item:
    if part["type"] == "input_image":
        return {**part, "image_url": place}
    return {**part, "input_audio": {**part["input_audio"], "data": place}}


def _changed(item: Item, change: Callable[[Item], Item]) -> Item:
    """The item with its pictures and sounds changed; itself if there are none."""
    if not any(map(_is_media, _parts(item))):
        return item
    name = "content" if "content" in item else "output"
    return {**item, name: [change(p) if _is_media(p) else p for p in item[name]]}
