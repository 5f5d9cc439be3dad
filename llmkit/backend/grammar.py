"""Grammars as token masks, by llguidance: compiled off the engine thread, asked for a mask on it.

The mask for the next token is computed on a thread of its own while llama.cpp decodes (llguidance releases the GIL), so that it is there when the logits are.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.backend.vocab import Vocab, on_a_deep_stack
from llmkit.errors import EngineError, InvalidRequestError
from llmkit.types import Grammar

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Constraint", "GrammarCompiler"]

MAX_FORCED = 32
MAX_KNOWN = 64
META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
STACK_BYTES = 512 << 20
# One way to write JSON: fewer choices are more forced tokens.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Makes constraints for one vocabulary. Thread-safe; made when the first grammar comes (about 0.1 s)."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llmkit-mask")
        self._known: OrderedDict[Grammar, Any] = OrderedDict()  # matchers to copy, and errors

    def compile(self, grammar: Grammar) -> Constraint | None:
        """None for an optional grammar that is not valid. Raises `InvalidRequestError` that says what is wrong with any other."""
        with self._lock:
            found = self._known.pop(grammar, None)
            if found is None:
                # llguidance recurses along chains of rules; without a deep stack a long one ends the process.
                found = on_a_deep_stack(STACK_BYTES, lambda: self._compile(grammar))
            self._known[grammar] = found
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            if isinstance(found, InvalidRequestError):
                if grammar.optional:
                    return None
                raise found
            return Constraint(found.deep_copy(), self._vocab, self._pool)

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        try:
            if self._tokenizer is None:
                self._tokenizer = make_tokenizer(self._vocab)
            matcher = llguidance.LLMatcher(self._tokenizer, _source(grammar), log_level=0)
            problem = matcher.get_error() if matcher.is_error() else None
        except InvalidRequestError as error:
            return error
        except Exception as error:
            problem = str(error)
        return matcher if problem is None else InvalidRequestError(f"the grammar ({grammar.kind}) is not valid: {problem:.500}", grammar.origin)

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own form."""
    import llguidance

    match grammar.kind:
        case "json_schema":
            return str(llguidance.LLMatcher.grammar_from_json_schema(grammar.text, defaults=JSON_STYLE))
        case "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(grammar.text))
        case "choice":
            choices = json.loads(grammar.text)
            if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
                raise InvalidRequestError("choice must be a list of texts, none of them empty.", "grammar")
            # One regular expression is one automaton; thousands of rules would be too many for the parser.
            return str(llguidance.LLMatcher.grammar_from_regex("|".join(re.sub(META, r"\\\g<0>", c) for c in choices)))
        case "gbnf":
            return str(llguidance.LLMatcher.grammar_from_lark(llguidance.gbnf_to_lark.gbnf_to_lark(grammar.text)))
        case _:
            return str(llguidance.LLMatcher.grammar_from_lark(grammar.text))


def make_tokenizer(vocab: Vocab) -> Any:
    """llguidance's picture of the vocabulary: the bytes of every token, and our tokenizer for what a grammar forces."""
    import llguidance

    class Tokens:
        eos_token_id = vocab.eos
        bos_token_id = vocab.bos if vocab.bos >= 0 else None
        tokens = vocab.pieces_with_specials()
        special_token_ids = sorted(vocab.control_tokens)

        def __call__(self, text: bytes) -> list[int]:
            return vocab.tokenize(text.decode("utf-8", "replace"), add_special=False)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), n_vocab=vocab.n_tokens, eos_token=vocab.eos)


class Constraint:
    """What one request's text must look like from here on."""

    def __init__(self, matcher: Any, vocab: Vocab, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._pool = pool
        self._n_vocab = vocab.n_tokens
        self._end = vocab.end_ids
        self._is_end = vocab.is_end
        self._mask: np.ndarray = np.zeros(-(-vocab.n_tokens // 32), np.int32)
        self._ready: Future[None] | None = None
        self._fresh = False

    def prepare(self) -> None:
        """Begin to compute the mask for the next token."""
        if not self._fresh and self._ready is None:
            self._ready = self._pool.submit(self._compute)

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def _settle(self) -> None:
        """Nobody else is at the matcher any more."""
        if self._ready is not None:
            ready, self._ready = self._ready, None
            ready.result()
            self._fresh = True
        if self._matcher.is_error():
            raise EngineError(f"the grammar cannot go on: {str(self._matcher.get_error()).splitlines()[0]:.300}")

    def allows(self, token: int) -> bool:
        """Whether the token may come next. Raises `EngineError` when the grammar itself failed."""
        self._settle()
        if self._matcher.is_stopped():
            return self._is_end(token)
        if self._is_end(token):
            return bool(self._matcher.is_accepting())
        if self._fresh:
            return bool(self._mask[token >> 5] >> (token & 31) & 1)
        return bool(self._matcher.validate_tokens([token]) == 1)

    def apply(self, logits: np.ndarray) -> None:
        """Rule out what may not come next: logits of shape (n_vocab,) become minus infinity there. Raises as ``allows``."""
        self._settle()
        if self._matcher.is_stopped():
            allowed = np.zeros(self._n_vocab, bool)
        else:
            if not self._fresh:
                self._compute()
                self._fresh = True
            allowed = np.unpackbits(self._mask.view(np.uint8), count=self._n_vocab, bitorder="little").view(bool)
        allowed[self._end] = self._matcher.is_stopped() or self._matcher.is_accepting()
        logits[~allowed] = -np.inf

    def accept(self, token: int) -> None:
        """The token was chosen."""
        self._settle()
        self._fresh = False
        if not self._is_end(token) and not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def forced(self) -> Sequence[int]:
        """The tokens that the grammar leaves no choice but to come next."""
        if self._matcher.is_stopped():
            return ()
        found: list[int] = self._matcher.compute_ff_tokens()
        return found[:MAX_FORCED]
