"""How one request chooses its tokens: a sampler chain in C, or an argmax in numpy; before either, a
grammar's mask. Engine thread only; parameters are validated beforehand."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from llmkit.backend.grammar import Constraint
from llmkit.backend.library import C, short
from llmkit.backend.patience import Patience
from llmkit.backend.vocab import Vocab
from llmkit.engine.batch import Score
from llmkit.errors import EngineError
from llmkit.protocol import SamplingParams

__all__ = ["ChainCache", "Sampler", "score"]

MINUS_INFINITY = float("-inf")
MAX_DRY = 16


class Sampler:
    """One request's choices. ``c_seconds`` counts the time spent in llama.cpp."""

    def __init__(
        self,
        params: SamplingParams,
        vocab: Vocab,
        history: Sequence[int],
        constraint: Constraint | None,
        chains: ChainCache,
        num_drawn: int = 0,
    ) -> None:
        self.logprobs = params.logprobs
        self.prompt_logprobs = params.prompt_logprobs or 0
        self.constraint = constraint
        self.c_seconds = 0.0
        self._end_tokens = vocab.end_ids if params.ignore_eos else None
        self._chain = (
            None if params.plain_greedy else Chain(params, vocab, history, chains, num_drawn)
        )

    def choose(
        self, context: Any, row: int, logits: np.ndarray, patience: Patience
    ) -> tuple[int, Score | None]:
        """The next token, and its score if requested. ``logits`` is a view of batch row ``row``,
        float32, shape (n_vocab,); it may be modified. Raises `Late`, with nothing chosen."""
        changes = self.constraint is not None or self._end_tokens is not None
        raw = logits.copy() if self.logprobs is not None and changes else logits
        if self._chain is None:
            token = self._argmax(logits, patience)
        else:
            if self.constraint is not None:
                self.constraint.apply(logits, patience)
            start = time.perf_counter()
            token = self._chain.sample(context, row)
            self.c_seconds += time.perf_counter() - start
        if self.constraint is not None:
            self.constraint.accept(token, with_mask=self._chain is not None)
        return token, None if self.logprobs is None else score(raw, token, self.logprobs)

    def _argmax(self, logits: np.ndarray, patience: Patience) -> int:
        """numpy on a view of the logits takes 18 us; the C chain takes 120, since it first copies
        the vocabulary."""
        token = int(logits.argmax())
        if self._end_tokens is not None and token in self._end_tokens:
            logits[self._end_tokens] = -np.inf
            token = int(logits.argmax())
        if self.constraint is not None and not self.constraint.allows(token, patience):
            self.constraint.apply(logits, patience)
            token = int(logits.argmax())
        return token

    def prepare(self, whole: bool = False) -> None:
        """Use the time until the logits arrive to compute the mask. A greedy choice rarely needs
        the ``whole`` mask."""
        if self.constraint is not None and (whole or self._chain is not None):
            self.constraint.prepare()

    @property
    def forced(self) -> Sequence[int]:
        """The tokens that must come next."""
        return self.constraint.forced if self.constraint is not None else ()

    def close(self) -> None:
        if self._chain is not None:
            self._chain.close()


def score(logits: np.ndarray, token: int, num_top: int) -> Score:
    """Log-probabilities from one row of logits, shape (n_vocab,)."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak).sum()))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = np.argpartition(logits, -num_top)[-num_top:]
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        top = tuple(zip(ids.tolist(), (logits[ids] - total).tolist(), strict=True))
    return Score(float(logits[token]) - total, top)


class Dry:
    """A DRY sampler to copy, freed with the last reference."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def copy(self) -> Any:
        return C.llama_sampler_clone(self._handle)

    def __del__(self) -> None:
        C.llama_sampler_free(self._handle)


class ChainCache:
    """DRY samplers by their settings: to create one, llama.cpp searches every token for every
    sequence breaker (a tenth of a second for sixteen of them). Thread-safe."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[object, ...], Future[Dry]] = OrderedDict()

    def dry(self, params: SamplingParams) -> Any:
        """A fresh sampler, owned by the caller."""
        settings = (
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            params.dry_penalty_last_n,
        )
        key = (*settings, params.dry_sequence_breakers)
        with self._lock:
            entry = self._known.get(key)
            mine = entry is None
            if entry is None:
                entry = self._known[key] = Future()
            self._known.move_to_end(key)
            while len(self._known) > MAX_DRY:
                self._known.popitem(last=False)
        if mine:
            try:
                breakers = [b.encode() for b in params.dry_sequence_breakers]
                entry.set_result(
                    Dry(
                        C.llama_sampler_init_dry(
                            self._vocab.handle,
                            *settings,
                            (ctypes.c_char_p * len(breakers))(*breakers),
                            len(breakers),
                        )
                    )
                )
            except BaseException as error:
                # The stop button of one caller is no reason for another.
                known = isinstance(error, Exception)
                entry.set_exception(error if known else EngineError("interrupted; try again"))
                with self._lock:
                    self._known.pop(key, None)
                raise
        return entry.result().copy()


class Chain:
    """llama.cpp's samplers in llama.cpp's order: bias, penalties, DRY, top-k, typical, top-p,
    min-p, XTC, temperature, draw.

    ``num_drawn`` draws are skipped: an earlier chain of this seed made them.
    """

    __slots__ = ("_free", "_sample", "chain")

    def __init__(
        self,
        params: SamplingParams,
        vocab: Vocab,
        history: Sequence[int],
        chains: ChainCache,
        num_drawn: int,
    ) -> None:
        self.chain: Any = None
        self._sample = short("llama_sampler_sample")
        self._free = short("llama_sampler_free")
        self.chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        samplers = _samplers(params, vocab, chains)
        for sampler in samplers:
            C.llama_sampler_chain_add(self.chain, sampler)
        if params.seed is not None and not (params.greedy or params.mirostat):
            _skip(samplers[-1], num_drawn)
        last_n = max(
            params.penalty_last_n, params.dry_penalty_last_n if params.dry_multiplier else 0
        )
        if last_n:
            accept = short("llama_sampler_accept")
            for token in [t for t in history if t >= 0][-last_n:]:  # cells of images are no tokens
                accept(self.chain, token)

    def sample(self, context: Any, row: int) -> int:
        """Draw from the logits of batch row ``row``; the choice counts for the next penalties."""
        return int(self._sample(self.chain, context, row))

    def close(self) -> None:
        if self.chain is not None:
            self._free(self.chain)
            self.chain = None

    def __del__(self) -> None:
        self.close()  # for a request that never ran


def _skip(draw: Any, count: int) -> None:
    """Have a draw among candidates happen ``count`` times. It takes one number from its generator
    each time, however many candidates there are."""
    only = C.llama_token_data(0, 0.0, 1.0)
    apply = short("llama_sampler_apply")
    for _ in range(count):
        candidates = C.llama_token_data_array(ctypes.pointer(only), 1, -1, False)
        apply(draw, ctypes.byref(candidates))


def _samplers(params: SamplingParams, vocab: Vocab, chains: ChainCache) -> list[Any]:
    steps: list[Any] = []
    bias = dict(params.logit_bias)
    if params.ignore_eos:
        bias.update((t, MINUS_INFINITY) for t in vocab.end_tokens)
    if bias:
        pairs = (C.llama_logit_bias * len(bias))(
            *((C.llama_logit_bias)(t, b) for t, b in bias.items())
        )
        steps.append(C.llama_sampler_init_logit_bias(vocab.n_tokens, len(bias), pairs))
    if (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    ):
        penalties = (
            params.penalty_last_n,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        steps.append(C.llama_sampler_init_penalties(vocab.n_tokens, *penalties))
    if params.dry_multiplier:
        steps.append(chains.dry(params))
    if params.greedy:
        return [*steps, C.llama_sampler_init_greedy()]
    seed = random.getrandbits(32) if params.seed is None else params.seed
    if params.mirostat:
        steps.append(C.llama_sampler_init_temp(params.temperature))
        if params.mirostat == 1:
            return [
                *steps,
                C.llama_sampler_init_mirostat(
                    vocab.n_tokens, seed, params.mirostat_tau, params.mirostat_eta, 100
                ),
            ]
        return [
            *steps,
            C.llama_sampler_init_mirostat_v2(seed, params.mirostat_tau, params.mirostat_eta),
        ]
    if params.top_k:
        steps.append(C.llama_sampler_init_top_k(min(params.top_k, vocab.n_tokens)))
    if params.typical_p < 1:
        steps.append(C.llama_sampler_init_typical(params.typical_p, 1))
    if params.top_p < 1:
        steps.append(C.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        steps.append(C.llama_sampler_init_min_p(params.min_p, 1))
    if params.xtc_probability > 0:
        steps.append(
            C.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed)
        )
    steps.append(C.llama_sampler_init_temp(params.temperature))
    return [*steps, C.llama_sampler_init_dist(seed)]
