"""Answers about a model's vocabulary and chat template: tokens of a text, text of tokens, the prompt of messages. Any thread; nothing is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.types import MAX_CHARS_PER_TOKEN, Inquiry, Message, ModelDescription, Tool

if TYPE_CHECKING:
    from llmkit.backend.vocab import Vocab
    from llmkit.chat.template import ChatTemplate

__all__ = ["answer"]

# A text may be counted though it is longer than the context; but not without end.
MAX_CONTEXTS = 16


def answer(inquiry: Inquiry, vocab: Vocab, template: ChatTemplate | None, description: ModelDescription) -> dict[str, Any]:
    """The answer to an `Inquiry`, JSON-ready. Raises `InvalidRequestError`."""
    data = inquiry.data
    match inquiry.kind:
        case "tokenize":
            return _tokenize(data["text"], data, vocab, description)
        case "detokenize":
            return {"text": b"".join(_piece(vocab, token) for token in data["tokens"]).decode("utf-8", "replace")}
        case "render":
            return {"text": _render(data, template)}
        case "tokenize_chat":
            return _tokenize(_render(data, template), {**data, "parse_special": True, "add_special": not vocab.adds_bos}, vocab, description)
        case "info":
            spelled = {"bos_token": vocab.token_text(vocab.bos), "eos_token": vocab.token_text(vocab.eos)}
            return {**spelled, "chat_template": template.source if template is not None else None, "adds_bos": vocab.adds_bos}


def _tokenize(text: str, data: dict[str, Any], vocab: Vocab, description: ModelDescription) -> dict[str, Any]:
    most = MAX_CONTEXTS * max(description.n_ctx, 1024)
    if len(text) > most * MAX_CHARS_PER_TOKEN:
        raise ContextLengthError(len(text) // MAX_CHARS_PER_TOKEN, most)
    tokens = vocab.tokenize(text, add_special=data.get("add_special", True), parse_special=data.get("parse_special", True))
    return {"tokens": tokens, "pieces": [_piece(vocab, t).decode("latin-1") for t in tokens] if data.get("with_pieces") else None}


def _piece(vocab: Vocab, token: int) -> bytes:
    """A token's bytes; of a control token its spelling."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab.n_tokens:
        raise InvalidRequestError(f"tokens: token ids go from 0 to {vocab.n_tokens - 1}; {token!r:.30} is none.", "tokens")
    return vocab.token_text(token).encode() if token in vocab.control_tokens else vocab.piece(token)


def _render(data: dict[str, Any], template: ChatTemplate | None) -> str:
    if template is None:
        raise InvalidRequestError("this model has no chat template.", "messages")
    messages = [Message(**m) for m in data["messages"]]
    tools = [Tool(**tool) for tool in data.get("tools", ())]
    options = data.get("template_options")
    return template.render(messages, add_generation_prompt=data.get("add_generation_prompt", True), tools=tools, options=options)
