"""The pictures and sounds of a request, from what its dialect writes to the files an engine gets.

Tornado loop only; files are decoded from base64, looked at and made smaller on a lane. Knows no
dialect: each says what stands where.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from llmkit.errors import InvalidRequestError
from llmkit.media import pictures
from llmkit.media.addresses import decoded, digest_of, from_data_url, is_data_url
from llmkit.media.taking import MAX_MEDIA, check_takes
from llmkit.protocol import Media, Message, ModelDescription

if TYPE_CHECKING:
    from llmkit.gateway.chats import Chat
    from llmkit.gateway.exchange import Exchange

__all__ = ["KEPT", "Attached", "check_all"]

KEPT = "llmkit-media:"  # before the digest of a file, in what is stored
FETCHING_S = 20.0  # for all files of a request
Kind = Literal["image", "audio"]


@dataclass(frozen=True, slots=True)
class Sent:
    """A file as it was sent: in base64, or as an address. ``param`` is the field it stands in."""

    kind: Kind
    text: str
    param: str
    is_url: bool = False
    is_low: bool = False


class Attached:
    """What a request to ``model`` has attached, gathered while its body becomes messages.

    Until they are ``read``, `Media` have a number in place of their digest; asked for again, they
    have the digest. Raises `InvalidRequestError` for the first that the model does not take, and
    for too many. Without a model, any may be attached. ``kept`` are the digests that may stand in
    place of files: those of stored items, which no client can make up.
    """

    def __init__(
        self,
        model: ModelDescription | None,
        param: str = "messages",
        kept: Collection[str] = (),
    ) -> None:
        self._model, self._param, self._kept = model, param, kept
        self._numbers: dict[Sent, str] = {}
        self._count = 0
        self._known: dict[str, Media] = {}  # by number
        self.files: dict[str, bytes] = {}  # by digest

    def image(self, text: str, *, is_url: bool, detail: str | None = None) -> Media:
        """A picture: base64, or with ``is_url`` an address, ``data:`` or https."""
        return self._add(Sent("image", text, self._param, is_url, detail == "low"))

    def audio(self, text: str) -> Media:
        """A sound: base64; a ``data:`` address will do."""
        return self._add(Sent("audio", text, self._param, is_data_url(text)))

    def _add(self, sent: Sent) -> Media:
        number = self._numbers.get(sent)
        if number in self._known:
            return self._known[number]
        if self._model is not None:
            check_takes(self._model, sent.kind, sent.param)
        self._count += 1
        if self._count > MAX_MEDIA:
            raise InvalidRequestError(
                f"{sent.param}: there may be at most {MAX_MEDIA} pictures and sounds in one "
                "request. Leave out the oldest.",
                sent.param,
            )
        number = self._numbers.setdefault(sent, f"sent-{len(self._numbers)}")
        return Media(number, sent.kind)

    async def read(self, exchange: Exchange) -> None:
        """Read what is attached. Raises `InvalidRequestError` for what is no such file, or cannot
        be had."""
        assert exchange.reading is not None
        until = asyncio.get_running_loop().time() + FETCHING_S
        for sent, number in self._numbers.items():
            work: Callable[[], tuple[str, bytes]] = partial(_read, sent)
            if sent.text.startswith(KEPT) and sent.text.removeprefix(KEPT) in self._kept:
                work = partial(_looked_at, await _kept(exchange, sent), sent)
            elif sent.is_url and not is_data_url(sent.text):
                fetched = await exchange.fetcher.fetch(sent.text, sent.param, until)
                exchange.hold(len(fetched))
                work = partial(_looked_at, fetched, sent)
            digest, data = await exchange.reading.aside(exchange, work)
            self.files[digest], self._known[number] = data, Media(digest, sent.kind)

    async def taken(self, exchange: Exchange, chat: Chat) -> Chat:
        """The chat with its files, each known by its digest. Raises as ``read`` does."""
        if not self._numbers:
            return chat
        await self.read(exchange)
        messages = tuple(self._settled(message) for message in chat.messages)
        return replace(chat, messages=messages, media={**chat.media, **self.files})

    def _settled(self, message: Message) -> Message:
        if not message.media:
            return message
        if message.role == "assistant":
            raise InvalidRequestError(
                "messages: an assistant's message may hold text only; pictures and sounds belong "
                "in user messages.",
                "messages",
            )
        parts = (self._known[p.digest] if isinstance(p, Media) else p for p in message.parts)
        return replace(message, content=tuple(parts))


def check_all(
    model: ModelDescription, messages: Sequence[Message], media: Mapping[str, bytes]
) -> None:
    """What a client of llmkit's own has attached, which gives the digests itself.

    Raises `InvalidRequestError`; nobody may pass off one file as another.
    """
    for item in [item for message in messages for item in message.media]:
        check_takes(model, item.kind, "messages")
        if item.digest not in media:
            raise InvalidRequestError("messages: a file of a message is missing.", "messages")
    if len(media) > MAX_MEDIA:
        raise InvalidRequestError(
            f"messages: there may be at most {MAX_MEDIA} pictures and sounds in one request.",
            "messages",
        )
    for digest, data in media.items():
        if digest_of(data) != digest:
            raise InvalidRequestError("messages: a file does not match its digest.", "messages")


async def _kept(exchange: Exchange, sent: Sent) -> bytes:
    """A file that is stored. Raises `InvalidRequestError` if it is not there."""
    assert exchange.turns is not None
    owner, digest = exchange.identity.name, sent.text.removeprefix(KEPT)
    files = await exchange.turns.shelf.look(owner, lambda store: store.media(owner, [digest]))
    if digest not in files:
        raise InvalidRequestError(f"{sent.param}: a file is not kept any more.", sent.param)
    return files[digest]


def _read(sent: Sent) -> tuple[str, bytes]:
    """A file from base64. Runs on a lane."""
    try:
        data = from_data_url(sent.text) if sent.is_url else decoded(sent.text)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{sent.param}: {error}", sent.param) from None
    return _looked_at(data, sent)


def _looked_at(data: bytes, sent: Sent) -> tuple[str, bytes]:
    """The file and its digest, if it is one that is read. Runs on a lane."""
    try:
        if sent.kind == "audio":
            from llmkit.media import sounds  # needs numpy

            sounds.check(data)
        else:
            pictures.facts(data)
            if sent.is_low:
                data = pictures.reduced(data, pictures.LOW_SIDE)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{sent.param}: {error}", sent.param) from None
    return digest_of(data), data
