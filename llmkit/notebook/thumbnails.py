"""Pictures of a conversation, small: some kilobytes each, so that a notebook stays small."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from html import escape

from llmkit.errors import InvalidRequestError
from llmkit.media import pictures
from llmkit.media.addresses import data_url
from llmkit.notebook import charts
from llmkit.protocol import Media

__all__ = ["media_html", "thumbnail_html"]

MAX_SHOWN = 128
_shown: OrderedDict[str, str] = OrderedDict()  # by digest, without the files


def media_html(items: Iterable[Media], files: Mapping[str, bytes]) -> str:
    """The pictures of a message as thumbnails; words in place of sounds, and of what is gone."""
    shown = [
        thumbnail_html(files[item.digest], item.digest)
        if item.kind == "image" and item.digest in files
        else _words("a sound" if item.kind == "audio" else "a picture")
        for item in items
    ]
    return f"<div>{''.join(shown)}</div>" if shown else ""


def thumbnail_html(data: bytes, digest: str) -> str:
    """One picture; words in place of one that cannot be read. The last ones are remembered."""
    shown = _shown.get(digest)
    if shown is None:
        shown = _shown[digest] = _made(data)
        while len(_shown) > MAX_SHOWN:
            _shown.popitem(last=False)
    return shown


def _made(data: bytes) -> str:
    try:
        facts, small = pictures.facts(data), pictures.thumbnail(data)
    except InvalidRequestError:
        return _words("a picture")
    about = f"picture, {facts.width} × {facts.height}, {facts.format}"
    style = f"margin:4px 6px 4px 0;border:1px solid {charts.LINE};border-radius:4px"
    about = escape(about)
    return f'<img src="{data_url(small)}" alt="{about}" title="{about}" style="{style}">'


def _words(what: str) -> str:
    return f'<span style="color:{charts.MUTED}">({what})</span> '
