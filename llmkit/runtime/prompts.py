"""Prompts, tokens of texts and texts of tokens, by a model's vocabulary and chat template.

Any thread; no model is run.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.engine.media import Item
from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.media.taking import refusal
from llmkit.protocol import (
    MAX_CHARS_PER_TOKEN,
    DescribeVocabulary,
    Detokenize,
    GenerationRequest,
    Media,
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
    from llmkit.runtime.media import MediaReader

__all__ = ["Prompt", "answer", "request_prompt"]

Answer = TypeVar("Answer")

# Texts longer than the context may be tokenized, but not without limit.
MAX_CHARS, MAX_BYTES = 1 << 20, 1 << 20
MAX_TOKENS, MAX_PIECES = 1 << 18, 1 << 16
CELL = -1  # stands for each token of an image or a sound where tokens are listed


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt, and the items of images and sounds among them."""

    tokens: list[int]
    media: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Files:
    """The images and sounds of a request, by digest, and who reads them; what comes of them is
    shared within one ``salt``. ``may_lack``: of files that are known already the digests will do,
    since nothing is computed."""

    reader: MediaReader | None
    files: Mapping[str, bytes]
    salt: str
    n_ctx: int
    may_lack: bool = False


def answer(
    question: Question[Answer],
    vocab: Vocab,
    template: ChatTemplate | None,
    reader: MediaReader | None = None,
    salt: str = "",
) -> Answer:
    """The answer to a question about the vocabulary or the template.

    Raises `InvalidRequestError`, also for questions about an engine, which only that can answer.
    """
    found: Any = _answer(question, vocab, template, reader, salt)
    return found  # type: ignore[no-any-return]


def _answer(
    question: Question[Any],
    vocab: Vocab,
    template: ChatTemplate | None,
    reader: MediaReader | None,
    salt: str,
) -> Any:
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
                [_with_marks(m, lambda media: f"<{media.kind}>") for m in question.messages],
                tools=question.tools,
                options=question.template_options,
                add_generation_prompt=question.add_generation_prompt,
                continue_final=question.continue_final,
            )
        case TokenizeChat():
            prompt = chat_prompt(
                vocab,
                _known(template),
                question.messages,
                question.tools,
                question.template_options,
                _check_length,
                Files(reader, question.media, salt, MAX_TOKENS, may_lack=True),
                add_generation_prompt=question.add_generation_prompt,
                continue_final=question.continue_final,
            )
            plain = [token if token >= 0 else CELL for token in prompt.tokens]
            return _described(plain, question.with_pieces, vocab)
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


def request_prompt(
    request: GenerationRequest,
    vocab: Vocab,
    template: ChatTemplate,
    n_ctx: int,
    reader: MediaReader | None = None,
    salt: str = "",
) -> Prompt:
    """The prompt of a request, short enough to leave room for one token.

    Raises `InvalidRequestError` and `ContextLengthError`.
    """
    param = "prompt" if request.messages is None else "messages"

    def check(text: str) -> None:
        if len(text) > n_ctx * MAX_CHARS_PER_TOKEN:
            raise ContextLengthError(len(text) // MAX_CHARS_PER_TOKEN, n_ctx, param)

    media: tuple[Item, ...] = ()
    if request.messages is not None:
        more = {"continue_final": True} if request.continue_final else {}
        prompt = chat_prompt(
            vocab,
            template,
            request.messages,
            request.tools,
            request.template_options,
            check,
            Files(reader, request.media, salt, n_ctx),
            **more,
        )
        tokens, media = prompt.tokens, prompt.media
        if media and request.sampling.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs: the tokens of images and sounds have none; leave it out.",
                "prompt_logprobs",
            )
    elif request.media:
        raise InvalidRequestError(
            "images and sounds go into messages, not beside a prompt.", "prompt"
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
    return Prompt(tokens, media)


def chat_prompt(
    vocab: Vocab,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    options: dict[str, Any],
    check: Callable[[str], None],
    files: Files,
    **more: Any,
) -> Prompt:
    """A conversation, rendered by the template.

    Control tokens spelled out within a message stay plain text. ``check`` sees the text before it
    is tokenized. Images and sounds pass the template as marks that nobody can guess.
    """
    fence = f"[{secrets.token_hex(12)}]"
    sent = _sent(messages, files)
    places = iter(range(len(sent)))
    marked = [_with_marks(m, lambda _: f"{fence[:-1]}-{next(places)}]") for m in messages]
    fenced = [_fenced_message(message, vocab, fence) for message in marked]
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
    mark = re.compile(f"{re.escape(fence[:-1])}-([0-9]+)\\]")
    if sorted(map(int, mark.findall(text))) != list(range(len(sent))):
        raise InvalidRequestError(
            "messages: the chat template leaves out an image or a sound, or repeats it.", "messages"
        )
    tokens: list[int] = []
    items: list[Item] = []
    for i, part in enumerate([first, *rest]):
        for j, piece in enumerate(mark.split(part)):
            if j % 2:
                media, data = sent[int(piece)]
                assert files.reader is not None
                placed = files.reader.place(media, data, files.salt, len(tokens), files.n_ctx)
                tokens += placed.tokens
                items += placed.items
            elif piece or not (i or j):
                tokens += vocab.tokenize(
                    piece,
                    add_special=not (i or j),
                    parse_special=i % 2 == 0,
                    param="messages",
                )
    if items and items[-1].end == len(tokens):
        raise InvalidRequestError(
            "messages: the prompt ends with an image or a sound; add text after it.", "messages"
        )
    return Prompt(tokens, tuple(items))


def _sent(messages: Sequence[Message], files: Files) -> list[tuple[Media, bytes | None]]:
    """The images and sounds of messages with their files. Raises `InvalidRequestError` for what the
    model does not take."""
    inputs = files.reader.inputs if files.reader is not None else ()
    sent = []
    for i, message in enumerate(messages):
        for media in message.media:
            if media.kind not in inputs:
                raise refusal(media.kind, inputs, f"messages[{i}]")
            data = files.files.get(media.digest)
            if data is None and not files.may_lack:
                raise InvalidRequestError(
                    f"messages[{i}] contains {media.kind} without its file.", "messages"
                )
            sent.append((media, data))
    return sent


def _with_marks(message: Message, mark: Callable[[Media], str]) -> Message:
    """The message as text, with a mark in place of each image and sound."""
    parts = (p if isinstance(p, str) else mark(p) for p in message.parts)
    return replace(message, content="".join(parts)) if message.media else message


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
    pieces = (
        tuple(b"" if token == CELL else _piece(vocab, token) for token in tokens)
        if with_pieces
        else None
    )
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
