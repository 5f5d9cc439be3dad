"""Grammars as token masks, by llguidance: compiled off the engine thread.

The mask for the next token is computed on another thread while llama.cpp decodes (llguidance
releases the GIL), so that it is ready when the logits are. If it is not, its request sits out the
step: others do not wait for a slow grammar.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.backend.patience import Patience
from llmkit.backend.vocab import Vocab, on_a_deep_stack
from llmkit.errors import EngineError, InvalidRequestError
from llmkit.protocol import Grammar
from llmkit.protocol.schema import normalized
from llmkit.system.lanes import Lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Constraint", "GrammarCompiler"]

MAX_FORCED = 32
MAX_KNOWN = 64
SLOW_S, SMOOTHING = 0.002, 0.3  # a grammar with slower calls moves to another thread
MAX_QUANTIFIERS, MAX_ALTERNATIVES = 4000, 1900
QUANTIFIER = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|([*+?{])", re.DOTALL)
META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
STACK_BYTES = 512 << 20
# One way to write JSON: fewer choices mean more forced tokens.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Compiles constraints for one vocabulary. Thread-safe; llguidance's view of the vocabulary is
    built with the first grammar (about 0.1 s)."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()
        self._lanes = Lanes(2, "llmkit-mask")
        # Matchers to copy and errors; or compilations still running.
        self._known: OrderedDict[Grammar, Future[Any]] = OrderedDict()

    def compile(
        self, grammar: Grammar, caller: str = "", begun: Sequence[int] = ()
    ) -> Constraint | None:
        """The constraint after the tokens ``begun``, or None for an optional grammar that is
        invalid. Raises `InvalidRequestError` with the reason for any other. On the caller's
        thread."""
        with self._lock:
            work = self._known.get(grammar)
            mine = work is None
            if work is None:
                work = self._known[grammar] = Future()
            self._known.move_to_end(grammar)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        if mine:
            try:
                # llguidance recurses along chains of rules; without a deep stack a long chain kills
                # the process.
                work.set_result(
                    on_a_deep_stack(STACK_BYTES, grammar.origin, lambda: self._compile(grammar))
                )
            except BaseException as error:
                # The stop button of one caller is no reason for another.
                known = isinstance(error, Exception)
                work.set_exception(error if known else EngineError("interrupted; try again"))
                with self._lock:
                    self._known.pop(grammar, None)
                raise
        compiled = work.result()
        if isinstance(compiled, InvalidRequestError):
            if grammar.optional:
                return None
            raise InvalidRequestError(str(compiled), compiled.param)
        with self._tokenizer_lock:  # copies of one matcher must not overlap
            copy = compiled.deep_copy()
        begun = [t for t in begun if not self._vocab.is_end(t)]
        if begun and not copy.consume_tokens(begun):
            raise InvalidRequestError("resume: the tokens do not match the grammar.", "resume")
        return Constraint(copy, self._vocab, lambda work: self._lanes.submit(caller, work))

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        try:
            with self._tokenizer_lock:
                if self._tokenizer is None:
                    self._tokenizer = make_tokenizer(self._vocab)
            matcher = llguidance.LLMatcher(
                self._tokenizer, source(grammar), log_level=0, limits=limits()
            )
            problem = matcher.get_error() if matcher.is_error() else self._try(matcher.deep_copy())
        except InvalidRequestError as error:
            return InvalidRequestError(
                str(error) if grammar.kind in str(error) else f"{grammar.kind}: {error}",
                grammar.origin,
            )
        except BaseException as error:  # the library's panics are not Exceptions
            problem = str(error)
        return (
            matcher
            if problem is None
            else InvalidRequestError(_explanation(grammar, str(problem)), grammar.origin)
        )

    def _try(self, copy: Any) -> str | None:
        """What is wrong with the first token: none is possible, or its mask costs too much."""
        mask = np.zeros(-(-self._vocab.n_tokens // 32), np.int32)
        copy.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if not copy.is_error():
            copy.compute_ff_tokens()
        allowed = np.flatnonzero(
            np.unpackbits(mask.view(np.uint8), count=self._vocab.n_tokens, bitorder="little")
        )
        usable = [int(t) for t in allowed[:64] if not self._vocab.is_end(int(t))]
        if usable and not copy.is_error():
            copy.consume_token(usable[0])
        return str(copy.get_error()) if copy.is_error() else None

    def close(self) -> None:
        self._lanes.close()


def _explanation(grammar: Grammar, problem: str) -> str:
    """llguidance's message, reworded where it would mislead."""
    line = problem.strip().splitlines()[0] if problem.strip() else "it cannot be parsed"
    if "NoExtensionBias" in problem:
        return f"the grammar ({grammar.kind}) matches no finite text."
    if "coerce_one_of" in problem:
        return (
            f"{grammar.origin}: oneOf has cases that overlap, which cannot be enforced; use anyOf."
        )
    if any(word in problem for word in ("oo many", "too big", "fuel", "panic", "max is")):
        return (
            f"the grammar ({grammar.kind}) is too large or too ambiguous ({line:.200}); "
            "simplify it."
        )
    return f"the grammar ({grammar.kind}) is not valid: {line:.500}"


def limits() -> Any:
    """What one grammar may cost: far below the library's own limits, which assume a single user."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=60_000,
        verbose_errors=False,
    )


def source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    import llguidance

    match grammar.kind:
        case "json_schema":
            schema = normalized(_json(grammar))
            return str(
                llguidance.LLMatcher.grammar_from_json_schema(
                    json.dumps(schema), defaults=JSON_STYLE
                )
            )
        case "regex":
            # Parsing time grows with the square of their number.
            if sum(map(bool, QUANTIFIER.findall(grammar.text))) > MAX_QUANTIFIERS:
                raise InvalidRequestError(
                    f"regex: at most {MAX_QUANTIFIERS} repetitions are supported.", grammar.origin
                )
            return str(llguidance.LLMatcher.grammar_from_regex(grammar.text))
        case "choice":
            choices = json.loads(grammar.text)
            if (
                not isinstance(choices, list)
                or not choices
                or not all(isinstance(c, str) and c for c in choices)
            ):
                raise InvalidRequestError("choice must be a list of non-empty strings.", "grammar")
            # One regular expression is one automaton; thousands of rules would overload the parser.
            return str(
                llguidance.LLMatcher.grammar_from_regex(
                    "|".join(re.sub(META, r"\\\g<0>", c) for c in choices)
                )
            )
        case "gbnf":
            from llmkit.backend.gbnf import to_lark  # takes a while, and few ask for it

            return str(llguidance.LLMatcher.grammar_from_lark(to_lark(grammar.text)))
        case _:
            rules = re.split(r"\n(?![ \t]*\|)", grammar.text)
            if max((rule.count("|") for rule in rules), default=0) > MAX_ALTERNATIVES:
                raise InvalidRequestError(
                    f"a grammar rule has too many alternatives; at most {MAX_ALTERNATIVES} are "
                    "supported.",
                    grammar.origin,
                )
            return str(llguidance.LLMatcher.grammar_from_lark(grammar.text))


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{grammar.origin}: the schema is not valid JSON: {error}", grammar.origin
        ) from None


def make_tokenizer(vocab: Vocab) -> Any:
    """llguidance's view of the vocabulary: token bytes, and our tokenizer for forced text."""
    import llguidance

    class Tokens:
        eos_token_id = vocab.eos
        bos_token_id = vocab.bos if vocab.bos >= 0 else None
        tokens = vocab.pieces_with_specials()
        special_token_ids = sorted(vocab.control_tokens)

        def __call__(self, text: bytes) -> list[int]:
            return vocab.tokenize(text.decode("utf-8", "replace"), add_special=False)

    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(Tokens()), n_vocab=vocab.n_tokens, eos_token=vocab.eos
    )


class Constraint:
    """What one request's text must match from here on. Engine thread, except for work passed to
    ``submit``.

    A grammar usually answers within microseconds, inline. A slow one works on another thread, and
    only its own request waits.
    """

    def __init__(
        self, matcher: Any, vocab: Vocab, submit: Callable[[Callable[[], None]], Future[None]]
    ) -> None:
        self._matcher = matcher
        self._submit = submit
        self._n_vocab = vocab.n_tokens
        self._end = vocab.end_ids
        self._is_end = vocab.is_end
        self._mask: np.ndarray = np.zeros(-(-vocab.n_tokens // 32), np.int32)
        self._work: Future[None] | None = None
        self._fresh = False  # the mask is for the next token
        self._allowed: tuple[int, bool] | None = None  # the token checked last, and the answer
        self._forced: Sequence[int] = ()
        self._step_s = 0.0  # seconds per call, smoothed
        self._seconds = 0.0
        self._compute()
        self._fresh = True
        self._check()

    @property
    def ready(self) -> bool:
        return self._work is None or self._work.done()

    def take_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def prepare(self) -> None:
        """Start computing the mask for the next token."""
        if not self._fresh and self._work is None:
            self._work = self._submit(self._timed_mask)

    def _compute(self) -> None:
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def _timed_mask(self) -> None:
        start = time.perf_counter()
        self._compute()
        self._fresh = True
        self._seconds += time.perf_counter() - start

    def _do(self, work: Callable[[], None], patience: Patience) -> None:
        """Work inline if the grammar is fast, else on another thread. Raises `Late`."""
        if self._step_s > SLOW_S:
            self._work = self._submit(lambda: self._timed(work))
            self._settle(patience)
        else:
            self._timed(work)
            self._check()

    def _timed(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self._step_s += SMOOTHING * (seconds - self._step_s)

    def _settle(self, patience: Patience) -> None:
        """Wait until the matcher is free. Raises `Late`, or `InvalidRequestError` on a failure."""
        if self._work is not None:
            patience.wait(self._work)
            self._work = None
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"the grammar failed: {str(self._matcher.get_error()).splitlines()[0]:.300}",
                "grammar",
            )

    def allows(self, token: int, patience: Patience | None = None) -> bool:
        """Whether the token may come next. Raises `Late`, or `InvalidRequestError` on a failure."""
        patience = patience or Patience(math.inf)
        self._settle(patience)
        if self._matcher.is_stopped():
            return self._is_end(token)
        if self._is_end(token):
            return bool(self._matcher.is_accepting())
        if self._fresh:
            return bool(self._mask[token >> 5] >> (token & 31) & 1)
        if self._allowed is None or self._allowed[0] != token:
            self._do(lambda: self._ask(token), patience)
        assert self._allowed is not None
        return self._allowed[1]

    def _ask(self, token: int) -> None:
        self._allowed = (token, self._matcher.validate_tokens([token]) == 1)

    def apply(self, logits: np.ndarray, patience: Patience) -> None:
        """Set logits, shape (n_vocab,), of disallowed tokens to -inf. Raises as ``allows``."""
        self._settle(patience)
        if self._matcher.is_stopped():
            allowed = np.zeros(self._n_vocab, bool)
        else:
            if not self._fresh:
                self.prepare()
                self._settle(patience)
            allowed = np.unpackbits(
                self._mask.view(np.uint8), count=self._n_vocab, bitorder="little"
            ).view(bool)
        allowed[self._end] = self._matcher.is_stopped() or self._matcher.is_accepting()
        logits[~allowed] = -np.inf

    def accept(self, token: int, with_mask: bool = False) -> None:
        """Take in the chosen token. ``with_mask``: the mask for the next one will be needed."""
        self._fresh, self._allowed, self._forced = False, None, ()

        def work() -> None:
            if not self._is_end(token) and not self._matcher.is_stopped():
                self._matcher.consume_token(token)
            if not self._matcher.is_stopped() and not self._matcher.is_error():
                self._forced = self._matcher.compute_ff_tokens()[:MAX_FORCED]

        if self._step_s > SLOW_S:

            def all_of_it() -> None:
                self._timed(work)
                if with_mask:
                    self._timed_mask()

            self._work = self._submit(all_of_it)
        else:
            self._timed(work)

    @property
    def forced(self) -> Sequence[int]:
        """The tokens that the grammar leaves as the only continuation, as far as known by now."""
        return self._forced if self.ready else ()
