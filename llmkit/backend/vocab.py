"""A model's vocabulary: text to tokens and back. Read-only in llama.cpp, so any thread may call it
while the model lives."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import unicodedata
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np

from llmkit.backend.library import C, short
from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.system.waiting import wait_through

__all__ = ["Vocab"]

# Most pre-tokenizers of llama.cpp match with std::regex, which recurses for every character of a
# match (about 400 to 700 bytes each): a match of some thousand characters overflows a thread's
# stack and kills the process. Only llama.cpp knows what a pattern matches at once, but except for
# white space none goes far beyond the end of a line; so the longest line or run of white space
# decides, and such a text is tokenized on a stack that is deep enough.
WORD_PIECE = 3
SAFE_LINE, MAX_LINE, STACK_PER_CHARACTER = 4000, 500_000, 2048
# Some patterns look ahead over all digits, or all white space, at each of them; so llama.cpp gets
# at most this many of them at a time.
MAX_ALIKE = 999
BYTE_PAIRS = 2
LINE_END = re.compile(r"[\r\n]+")
SPACE = re.compile(r"\s{1000,}")
_stack_lock = threading.Lock()
T = TypeVar("T")


@cache
def _alike() -> re.Pattern[str]:
    """Matches very long runs of digits of any kind, or of white space."""
    numbers = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "N"]
    return re.compile(
        f"[{''.join(map(re.escape, numbers))}]{{{MAX_ALIKE + 1},}}|\\s{{{MAX_ALIKE + 1},}}"
    )


def in_pieces(text: str) -> list[str]:
    """The text, cut within very long runs of digits and of white space."""
    if len(text) <= MAX_ALIKE:
        return [text]
    cuts = [
        at
        for run in _alike().finditer(text)
        for at in range(run.start() + MAX_ALIKE, run.end(), MAX_ALIKE)
    ]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def longest_run(text: str) -> int:
    """The most characters that a pattern may match at once: a line with its end, or white space of
    any kind. 0 for a short text."""
    if len(text) <= SAFE_LINE:
        return 0
    longest = max((space.end() - space.start() for space in SPACE.finditer(text)), default=0)
    start = 0
    for end in LINE_END.finditer(text):
        longest = max(longest, end.end() - start)
        start = end.start()  # white space before a word may begin with line ends
    return max(longest, len(text) - start)


def on_a_deep_stack(num_bytes: int, param: str, work: Callable[[], T]) -> T:
    """Run ``work`` on a thread with that much stack; pages are allocated only as they are used.

    Raises what ``work`` raises on purpose, and `InvalidRequestError` for ``param`` if it fails.
    """
    result: list[T] = []
    failures: list[Exception] = []
    ended = threading.Event()

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            failures.append(error)
        finally:
            ended.set()

    with _stack_lock:
        before = threading.stack_size((16 << 20) + -(-num_bytes // 4096) * 4096)
        try:
            threading.Thread(target=run, name="llmkit-deep").start()
        finally:
            threading.stack_size(before)
    wait_through(ended)  # the vocabulary must not be freed before this ends
    if failures and isinstance(failures[0], LLMKitError):
        raise failures[0]
    if not result:
        reason = failures[0] if failures else None
        raise InvalidRequestError(f"{param} could not be processed.", param) from reason
    return result[0]


class Vocab:
    """Tokenizer of one loaded model.

    ``tokenize`` turns text into ids; ``piece`` returns the bytes of one id (empty for control
    tokens); ``is_end`` identifies end-of-generation ids.
    """

    def __init__(self, model: Any) -> None:
        self._vocab = C.llama_model_get_vocab(model)
        self.n_tokens = int(C.llama_vocab_n_tokens(self._vocab))
        self.bos = int(C.llama_vocab_bos(self._vocab))
        self.eos = int(C.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(C.llama_vocab_get_add_bos(self._vocab))
        self.type = int(C.llama_vocab_type(self._vocab))
        self._has_byte_pairs = self.type == BYTE_PAIRS
        self._to_piece = short("llama_token_to_piece")
        self._pieces: dict[int, bytes] = {}
        self.end_tokens = frozenset(
            t for t in range(self.n_tokens) if C.llama_vocab_is_eog(self._vocab, t)
        )
        self.control_tokens = (
            frozenset(t for t in range(self.n_tokens) if C.llama_vocab_is_control(self._vocab, t))
            | self.end_tokens
        )
        self.end_ids = np.array(sorted(self.end_tokens), np.int64)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the spelling of any control token."""
        spelled = sorted(
            (re.escape(text) for t in self.control_tokens if (text := self.token_text(t))),
            key=len,
            reverse=True,
        )
        return re.compile("|".join(spelled) or r"(?!)")

    @property
    def handle(self) -> Any:
        """llama.cpp's own handle."""
        return self._vocab

    def is_same(self, other: Vocab) -> bool:
        """Whether both give the same ids for the same texts, judging by some thousand tokens."""
        if self.n_tokens != other.n_tokens or self.end_tokens != other.end_tokens:
            return False
        return all(
            self.token_text(t) == other.token_text(t)
            for t in range(0, self.n_tokens, max(1, self.n_tokens // 4000))
        )

    def pair(self, query: str, document: str) -> list[int]:
        """Both texts in one sequence, as cross-encoders read them."""
        first = self.tokenize(query, param="query")
        second = self.tokenize(document, param="input")
        # A word piece tokenizer has added the separator.
        if (
            C.llama_vocab_get_add_sep(self._vocab)
            and int(C.llama_vocab_type(self._vocab)) != WORD_PIECE
        ):
            first.append(int(C.llama_vocab_sep(self._vocab)))
        return first + (second[1:] if self.adds_bos and second[:1] == [self.bos] else second)

    def fill_in(self, prefix: str, suffix: str) -> list[int]:
        """The tokens that request the text between ``prefix`` and ``suffix``. Raises
        `InvalidRequestError` if the vocabulary has no tokens for that."""
        before, between, after = (
            int(f(self._vocab))
            for f in (C.llama_vocab_fim_pre, C.llama_vocab_fim_suf, C.llama_vocab_fim_mid)
        )
        if min(before, between, after) < 0:
            raise InvalidRequestError(
                "suffix: this model does not support fill-in-the-middle (its vocabulary has no "
                "tokens for it).",
                "suffix",
            )
        first = self.tokenize(prefix, add_special=False)
        second = self.tokenize(suffix, add_special=False, param="suffix")
        return [*([self.bos] if self.adds_bos else []), before, *first, between, *second, after]

    def is_end(self, token: int) -> bool:
        return token in self.end_tokens

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = False,
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of a text. ``add_special`` adds what the model expects around a text (such as a
        beginning token); ``parse_special`` reads ``<|…|>`` in the text as control tokens: for
        templates, not for user input. Raises `InvalidRequestError` for ``param``."""
        pieces = in_pieces(text) if self._has_byte_pairs else [text]
        tokens = self._tokenize_piece(pieces[0], add_special, parse_special, param)
        if len(pieces) > 1:
            end = (
                [tokens.pop()]
                if add_special and C.llama_vocab_get_add_eos(self._vocab) and tokens
                else []
            )
            tokens += [
                t
                for piece in pieces[1:]
                for t in self._tokenize_piece(piece, False, parse_special, param)
            ] + end
        return tokens

    def _tokenize_piece(
        self, text: str, add_special: bool, parse_special: bool, param: str
    ) -> list[int]:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                "the text is not valid Unicode: it contains a lone surrogate at character "
                f"{error.start}.",
                param,
            ) from None
        size = len(data) + 16
        line = longest_run(text)
        if line > MAX_LINE:
            raise InvalidRequestError(
                f"the text contains {line} characters without a break; at most {MAX_LINE} can be "
                "tokenized.",
                param,
            )
        if line > SAFE_LINE:
            return on_a_deep_stack(
                STACK_PER_CHARACTER * line,
                param,
                lambda: self._tokenize(data, size, add_special, parse_special, param),
            )
        return self._tokenize(data, size, add_special, parse_special, param)

    def _tokenize(
        self, data: bytes, size: int, add_special: bool, parse_special: bool, param: str
    ) -> list[int]:
        while True:
            tokens = (C.llama_token * size)()
            n = C.llama_tokenize(
                self._vocab, data, len(data), tokens, size, add_special, parse_special
            )
            if n >= 0:
                return tokens[:n]
            if n == -(2**31):
                raise InvalidRequestError("the text is too long to tokenize.", param)
            size = -n

    def piece(self, token: int) -> bytes:
        """The bytes that this token adds to a text."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(512)
        n = self._to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def pieces_with_specials(self) -> list[bytes]:
        """The bytes of every token; for control tokens, their spelling."""
        return [
            self.token_text(t).encode() if t in self.control_tokens else self.piece(t)
            for t in range(self.n_tokens)
        ]

    def token_text(self, token: int) -> str:
        """The token as the vocabulary spells it, control tokens included (``<|im_end|>``)."""
        text = C.llama_vocab_get_text(self._vocab, token) if 0 <= token < self.n_tokens else None
        return text.decode("utf-8", "replace") if text else ""
