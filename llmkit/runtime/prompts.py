"""Prompts, tokens of texts and texts of tokens, by a model's vocabulary and chat template.

Any thread; no model is run.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.protocol import (
    MAX_CHARS_PER_TOKEN,
    DescribeVocabulary,
    Detokenize,
    GenerationRequest,
    Message,
    Question,
    RenderChat,
    Tokenize,
    TokenizeChat,
    Tokens,
    Tool,
    Unload,
    Vocabulary,
)

if TYPE_CHECKING:
    from llmkit.backend.vocab import Vocab
    from llmkit.chat.template import ChatTemplate

__all__ = ["answer", "request_tokens"]

Answer = TypeVar("Answer")

# Texts longer than the context may be tokenized, but not without limit.
MAX_CHARS, MAX_BYTES = 1 << 20, 1 << 20
MAX_TOKENS, MAX_PIECES = 1 << 18, 1 << 16


def answer(question: Question[Answer], vocab: Vocab, template: ChatTemplate | None) -> Answer:
    """The answer to a question about the vocabulary or the template.

    Raises `InvalidRequestError`, also for questions about an engine, which only that can answer.
    """
    found: Any = _answer(question, vocab, template)
    return found  # type: ignore[no-any-return]


def _answer(question: Question[Any], vocab: Vocab, template: ChatTemplate | None) -> Any:
    match question:
        case Tokenize():
            return _tokenize(question, vocab)
        case Detokenize():
            if len(question.tokens) > MAX_TOKENS:
                raise InvalidRequestError(
                    f"tokens: at most {MAX_TOKENS} at a time, not {len(question.tokens)}.",
                    "tokens",
                )
            pieces = b"".join(_piece(vocab, token) for token in question.tokens)
            return pieces.decode("utf-8", "replace")
        case RenderChat():
            return _known(template).render(
                question.messages,
                tools=question.tools,
                options=question.template_options,
                add_generation_prompt=question.add_generation_prompt,
                continue_final=question.continue_final,
            )
        case TokenizeChat():
            tokens = prompt_tokens(
                vocab,
                _known(template),
                question.messages,
                question.tools,
                question.template_options,
                _check_length,
                add_generation_prompt=question.add_generation_prompt,
                continue_final=question.continue_final,
            )
            return _described(tokens, question.with_pieces, vocab)
        case DescribeVocabulary():
            return Vocabulary(
                bos_token=vocab.token_text(vocab.bos),
                eos_token=vocab.token_text(vocab.eos),
                adds_bos=vocab.adds_bos,
                chat_template=None if template is None else template.source,
            )
        case Unload():
            raise InvalidRequestError("only from another process; here, unload() its handle.")
    raise InvalidRequestError(
        "an embedding model has no steps, slots or running requests to show.", "model"
    )


def request_tokens(
    request: GenerationRequest, vocab: Vocab, template: ChatTemplate, n_ctx: int
) -> list[int]:
    """The prompt of a request, short enough to leave room for one token.

    Raises `InvalidRequestError` and `ContextLengthError`.
    """
    param = "prompt" if request.messages is None else "messages"

    def check(text: str) -> None:
        if len(text) > n_ctx * MAX_CHARS_PER_TOKEN:
            raise ContextLengthError(len(text) // MAX_CHARS_PER_TOKEN, n_ctx, param)

    if request.messages is not None:
        refuse_media(request.messages)
        more = {"continue_final": True} if request.continue_final else {}
        tokens = prompt_tokens(
            vocab,
            template,
            request.messages,
            request.tools,
            request.template_options,
            check,
            **more,
        )
    elif isinstance(request.prompt, tuple):
        tokens = list(request.prompt)
        for token in tokens:
            if (
                not isinstance(token, int)
                or isinstance(token, bool)
                or not 0 <= token < vocab.n_tokens
            ):
                raise InvalidRequestError(
                    f"prompt: token id {token!r:.30} is out of range (0–{vocab.n_tokens - 1}).",
                    "prompt",
                )
    else:
        text = request.prompt or ""
        check(text + (request.suffix or ""))
        tokens = (
            vocab.tokenize(text, parse_special=request.parse_special)
            if request.suffix is None
            else vocab.fill_in(text, request.suffix)
        )
    if not tokens:
        raise InvalidRequestError("the prompt is empty; give at least one token.", param)
    if len(tokens) >= n_ctx:
        raise ContextLengthError(len(tokens), n_ctx, param)
    return tokens


def refuse_media(messages: Sequence[Message]) -> None:
    """Raises `InvalidRequestError` for images and audio, which no model takes yet."""
    for i, message in enumerate(messages):
        if message.media:
            kind = {"image": "an image", "audio": "audio"}[message.media[0].kind]
            raise InvalidRequestError(
                f"messages[{i}] contains {kind}; this model reads text only.", "messages"
            )


def prompt_tokens(
    vocab: Vocab,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    options: dict[str, Any],
    check: Callable[[str], None],
    **more: Any,
) -> list[int]:
    """The tokens of a conversation, rendered by the template.

    Control tokens spelled out within a message stay plain text. ``check`` sees the text before it
    is tokenized.
    """
    fence = f"[{secrets.token_hex(12)}]"
    fenced = [_fenced_message(message, vocab, fence) for message in messages]
    text = template.render(
        fenced,
        tools=_fenced(list(tools), vocab, fence),
        options=_fenced(options, vocab, fence),
        **more,
    )
    bos = vocab.token_text(vocab.bos)
    text = text.removeprefix(bos) if bos and vocab.adds_bos else text
    check(text)
    first, *rest = text.split(fence)
    if len(rest) % 2:
        raise InvalidRequestError(
            "messages: the chat template cuts in two what is spelled like a control token; "
            "leave it out.",
            "messages",
        )
    tokens = vocab.tokenize(first, parse_special=True, param="messages")
    for i, part in enumerate(rest):
        if part:
            tokens += vocab.tokenize(
                part, add_special=False, parse_special=i % 2 == 1, param="messages"
            )
    return tokens


def _fenced_message(message: Message, vocab: Vocab, fence: str) -> Message:
    """The message with fences around text spelled like control tokens.

    An assistant's content is exempt: a model may have written them.
    """
    names = (
        ("name", "tool_call_id")
        if message.role == "assistant"
        else ("name", "tool_call_id", "content")
    )
    return replace(
        message, **{name: _fenced(getattr(message, name), vocab, fence) for name in names}
    )


def _fenced(value: Any, vocab: Vocab, fence: str) -> Any:
    """The same for all strings in a value."""
    if isinstance(value, str):
        return vocab.control_pattern.sub(lambda found: f"{fence}{found[0]}{fence}", value)
    if isinstance(value, Tool):
        return Tool(
            value.name,
            _fenced(value.description, vocab, fence),
            _fenced(value.parameters, vocab, fence),
        )
    if isinstance(value, list):
        return [_fenced(item, vocab, fence) for item in value]
    if isinstance(value, dict):
        return {
            _fenced(key, vocab, fence): _fenced(item, vocab, fence) for key, item in value.items()
        }
    return value


def _tokenize(question: Tokenize, vocab: Vocab) -> Tokens:
    _check_length(question.text)
    tokens = vocab.tokenize(
        question.text,
        add_special=question.add_special,
        parse_special=question.parse_special,
    )
    return _described(tokens, question.with_pieces, vocab)


def _check_length(text: str) -> None:
    if len(text) > MAX_CHARS:
        raise InvalidRequestError(
            f"the text has {len(text)} characters; at most {MAX_CHARS} are tokenized at a time.",
            "prompt",
        )
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise InvalidRequestError(
            f"the text has {size} bytes; at most {MAX_BYTES} are tokenized at a time.", "prompt"
        )


def _described(tokens: list[int], with_pieces: bool, vocab: Vocab) -> Tokens:
    if with_pieces and len(tokens) > MAX_PIECES:
        raise InvalidRequestError(
            f"at most {MAX_PIECES} tokens are listed with pieces, and the text has {len(tokens)}; "
            "leave the pieces out.",
            "prompt",
        )
    pieces = tuple(_piece(vocab, token) for token in tokens) if with_pieces else None
    return Tokens(tuple(tokens), pieces)


def _piece(vocab: Vocab, token: int) -> bytes:
    """A token's bytes; for a control token, its spelling."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab.n_tokens:
        raise InvalidRequestError(
            f"tokens: token id {token!r:.30} is out of range (0–{vocab.n_tokens - 1}).", "tokens"
        )
    return vocab.token_text(token).encode() if token in vocab.control_tokens else vocab.piece(token)


def _known(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise InvalidRequestError("this model has no chat template.", "messages")
    return template
