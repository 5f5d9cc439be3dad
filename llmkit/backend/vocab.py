"""A model's vocabulary: text to tokens and back. Read-only in llama.cpp, so any thread may call it while the model lives."""

from __future__ import annotations

import ctypes
from typing import Any

from llmkit.backend.library import C, short
from llmkit.errors import InvalidRequestError

__all__ = ["Vocab"]


class Vocab:
    """Tokenizer of one loaded model.

    ``tokenize`` turns text into ids; ``piece`` gives the bytes of one id (empty for control tokens); ``is_end`` tells end-of-generation ids.
    """

    def __init__(self, model: Any) -> None:
        self._vocab = C.llama_model_get_vocab(model)
        self.n_tokens = int(C.llama_vocab_n_tokens(self._vocab))
        self.bos = int(C.llama_vocab_bos(self._vocab))
        self.eos = int(C.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(C.llama_vocab_get_add_bos(self._vocab))
        self._to_piece = short("llama_token_to_piece")
        self._pieces: dict[int, bytes] = {}
        self.end_tokens = frozenset(t for t in range(self.n_tokens) if C.llama_vocab_is_eog(self._vocab, t))

    def is_end(self, token: int) -> bool:
        return token in self.end_tokens

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text. ``add_special`` adds what the model wants around a text (such as a beginning token);
        ``parse_special`` reads ``<|…|>`` in the text as control tokens: for templates, not for what users typed.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text holds a lone surrogate at character {error.start}; it is not valid Unicode.", "prompt") from None
        size = len(data) + 16
        while True:
            tokens = (C.llama_token * size)()
            n = C.llama_tokenize(self._vocab, data, len(data), tokens, size, add_special, parse_special)
            if n >= 0:
                return tokens[:n]
            if n == -(2**31):
                raise InvalidRequestError("the text is too long to be tokenized.", "prompt")
            size = -n

    def piece(self, token: int) -> bytes:
        """The bytes that this token adds to a text."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token)
        return found

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(512)
        n = self._to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def token_text(self, token: int) -> str:
        """The token as the vocabulary spells it, control tokens included (``<|im_end|>``)."""
        text = C.llama_vocab_get_text(self._vocab, token) if 0 <= token < self.n_tokens else None
        return text.decode("utf-8", "replace") if text else ""
