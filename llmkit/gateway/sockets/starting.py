"""A client's message becomes a turn. Tornado loop only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from llmkit.gateway.access.identity import Identity
from llmkit.gateway.conversations.detached import Wish
from llmkit.gateway.conversations.schemas import ROOT
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets.messages import Edit, Regenerate, Send, encode

if TYPE_CHECKING:
    from llmkit.gateway.conversations.turns import Turn, Turns

__all__ = ["start"]


async def start(
    turns: Turns, identity: Identity, address: str, message: Send | Edit | Regenerate
) -> Turn:
    """Begin the turn that a message asks for. Raises `ApiError`."""
    match message:
        case Send():
            wish = Wish("send", message.session)
            body = _said(message)
        case Edit():
            wish = Wish("edit", message.session, message.message)
            body = {"content": message.content}
        case Regenerate():
            wish = Wish("regenerate", message.session, message.message)
            body = {}
    given = dict(message.settings or {})
    if message.tools is not None:
        given["tools"] = message.tools
    if given:
        body["settings"] = given
    if message.model is not None:
        body["model"] = message.model
    return await turns.start(identity, address, wish, encode(body))


def _said(message: Send) -> dict[str, Any]:
    if (message.content is None) == (message.messages is None):
        raise ApiError(400, "Give content, or messages.", param="content", code="invalid_message")
    if message.messages is None:
        body: dict[str, Any] = {"message": {"role": "user", "content": message.content}}
    else:
        body = {"messages": message.messages}
    if message.parent is not UNSET:
        body["parent"] = message.parent or ROOT
    return {**body, "branch": message.branch}
