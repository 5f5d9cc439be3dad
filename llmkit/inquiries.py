"""Answers about a model's vocabulary and chat template: tokens of a text, text of tokens, the prompt of messages. Any thread; nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkit.errors import InvalidRequestError
from llmkit.types import Inquiry, Message, Tool

if TYPE_CHECKING:
    from llmkit.backend.vocab import Vocab
    from llmkit.chat.template import ChatTemplate

__all__ = ["answer", "prompt_text"]

# A text may be counted though it is longer than the context; but not without end.
MAX_CHARS = 1 << 20
MAX_TOKENS = 1 << 18


def answer(inquiry: Inquiry, vocab: Vocab, template: ChatTemplate | None) -> dict[str, Any]:
    """The answer to an `Inquiry`, JSON-ready. Raises `InvalidRequestError`."""
    data = inquiry.data
    match inquiry.kind:
        case "tokenize":
            return _tokenize(data["text"], data, vocab)
        case "detokenize":
            if len(data["tokens"]) > MAX_TOKENS:
                raise InvalidRequestError(f"tokens: at most {MAX_TOKENS} at a time, not {len(data['tokens'])}.", "tokens")
            return {"text": b"".join(_piece(vocab, token) for token in data["tokens"]).decode("utf-8", "replace")}
        case "render":
            return {"text": _render(data, template)}
        case "tokenize_chat":
            return _tokenize(prompt_text(vocab, _known(template), *_conversation(data)), {**data, "parse_special": True, "add_special": True}, vocab)
        case "info":
            spelled = {"bos_token": vocab.token_text(vocab.bos), "eos_token": vocab.token_text(vocab.eos)}
            return {**spelled, "chat_template": template.source if template is not None else None, "adds_bos": vocab.adds_bos}


def prompt_text(vocab: Vocab, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool], options: dict[str, Any], **more: Any) -> str:
    """What is tokenized for a chat: the template's text, without the beginning that the tokenizer adds."""
    text = template.render(messages, tools=tools, options=options, **more)
    bos = vocab.token_text(vocab.bos)
    return text.removeprefix(bos) if bos and vocab.adds_bos else text


def _tokenize(text: str, data: dict[str, Any], vocab: Vocab) -> dict[str, Any]:
    if len(text) > MAX_CHARS:
        raise InvalidRequestError(f"the text has {len(text)} characters; at most {MAX_CHARS} are tokenized at a time.", "prompt")
    tokens = vocab.tokenize(text, add_special=data.get("add_special", True), parse_special=data.get("parse_special", True))
    return {"tokens": tokens, "pieces": [_piece(vocab, t).decode("latin-1") for t in tokens] if data.get("with_pieces") else None}


def _piece(vocab: Vocab, token: int) -> bytes:
    """A token's bytes; of a control token its spelling."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab.n_tokens:
        raise InvalidRequestError(f"tokens: token ids go from 0 to {vocab.n_tokens - 1}; {token!r:.30} is none.", "tokens")
    return vocab.token_text(token).encode() if token in vocab.control_tokens else vocab.piece(token)


def _render(data: dict[str, Any], template: ChatTemplate | None) -> str:
    messages, tools, options = _conversation(data)
    return _known(template).render(messages, add_generation_prompt=data.get("add_generation_prompt", True), tools=tools, options=options)


def _known(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise InvalidRequestError("this model has no chat template.", "messages")
    return template


def _conversation(data: dict[str, Any]) -> tuple[list[Message], list[Tool], dict[str, Any]]:
    return [Message(**m) for m in data["messages"]], [Tool(**tool) for tool in data.get("tools", ())], data.get("template_options") or {}
