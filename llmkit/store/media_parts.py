"""Pictures and sounds in the content of messages: stored by digest, in files as themselves. Pure.

A file has them in OpenAI's parts, so that other programs can read it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmkit.media import pictures
from llmkit.media.addresses import as_part, decoded, digest_of, from_data_url, is_data_url

__all__ = ["with_digests", "with_files", "with_words"]

TYPES = ("text", "refusal", "image_url", "input_audio", "media")
KEYS = ("type", "text", "refusal", "image_url", "input_audio", "digest", "kind")
KEYS_WITHIN = ("url", "detail", "data", "format")
Content = str | list[dict[str, Any]]


def with_digests(content: Content, files: dict[str, bytes]) -> Content:
    """Content whose files are known by their digests, and added to ``files``.

    Raises `InvalidRequestError` for what is no picture or sound. Addresses of others stay.
    """
    if not isinstance(content, list):
        return content
    return [_taken(_known(part), files) if isinstance(part, dict) else part for part in content]


def _known(part: dict[str, Any]) -> dict[str, Any]:
    """A part of ours, without what others may have added to it; any other as it is."""
    if part.get("type") not in TYPES:
        return part
    kept = {key: value for key, value in part.items() if key in KEYS}
    return kept | {
        key: {k: v for k, v in value.items() if k in KEYS_WITHIN}
        for key, value in kept.items()
        if isinstance(value, dict)
    }


def _taken(part: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    match part:
        case {"type": "image_url", "image_url": str(url) | {"url": str(url)}} if is_data_url(url):
            data = from_data_url(url)
            pictures.facts(data)
            kind = "image"
        case {"type": "input_audio", "input_audio": {"data": str(text)}}:
            from llmkit.media import sounds  # needs numpy

            data = decoded(text)
            sounds.check(data)
            kind = "audio"
        case _:
            return part
    files[digest := digest_of(data)] = data
    return {"type": "media", "digest": digest, "kind": kind}


def with_files(content: Content, files: Mapping[str, bytes]) -> Content:
    """Stored content with its files in it; words stand in place of those that are gone."""
    if isinstance(content, str):
        return content
    return [_given(part, files) if part.get("type") == "media" else part for part in content]


def _given(part: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    return as_part(str(part.get("kind")), files.get(str(part.get("digest"))))


def with_words(content: Content, files: Collection[str]) -> Content:
    """Stored content as a model can be told it: words in place of files that are not there."""
    if isinstance(content, str):
        return content
    gone = [p for p in content if p.get("type") == "media" and p.get("digest") not in files]
    return [_given(part, {}) if part in gone else part for part in content]
