"""A request's sampler chain, in C. Engine thread only; parameters were validated before they come here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llmkit.backend.library import C, short
from llmkit.backend.vocab import Vocab
from llmkit.types import SamplingParams

__all__ = ["SamplerChain"]

MINUS_INFINITY = float("-inf")


class SamplerChain:
    """llama.cpp's samplers in llama.cpp's order: bias, penalties, top-k, typical, top-p, min-p, temperature, draw."""

    __slots__ = ("_free", "_sample", "chain")

    def __init__(self, params: SamplingParams, vocab: Vocab, history: Sequence[int]) -> None:
        self._sample = short("llama_sampler_sample")
        self._free = short("llama_sampler_free")
        self.chain: Any = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for sampler in _samplers(params, vocab):
            C.llama_sampler_chain_add(self.chain, sampler)
        if params.penalty_last_n:
            accept = short("llama_sampler_accept")
            for token in history[-params.penalty_last_n :]:
                accept(self.chain, token)

    def sample(self, context: Any, row: int) -> int:
        """Draw from the logits of batch row ``row``; the choice counts for the penalties of the next."""
        return int(self._sample(self.chain, context, row))

    def close(self) -> None:
        if self.chain is not None:
            self._free(self.chain)
            self.chain = None


def _samplers(params: SamplingParams, vocab: Vocab) -> list[Any]:
    steps: list[Any] = []
    bias = dict(params.logit_bias)
    if params.ignore_eos:
        bias.update((t, MINUS_INFINITY) for t in vocab.end_tokens)
    if bias:
        pairs = (C.llama_logit_bias * len(bias))(*((C.llama_logit_bias)(t, b) for t, b in bias.items()))
        steps.append(C.llama_sampler_init_logit_bias(vocab.n_tokens, len(bias), pairs))
    if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
        penalties = (params.penalty_last_n, params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        steps.append(C.llama_sampler_init_penalties(vocab.n_tokens, *penalties))
    if params.greedy:
        return [*steps, C.llama_sampler_init_greedy()]
    if params.top_k:
        steps.append(C.llama_sampler_init_top_k(min(params.top_k, vocab.n_tokens)))
    if params.typical_p < 1:
        steps.append(C.llama_sampler_init_typical(params.typical_p, 1))
    if params.top_p < 1:
        steps.append(C.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        steps.append(C.llama_sampler_init_min_p(params.min_p, 1))
    steps.append(C.llama_sampler_init_temp(params.temperature))
    seed = random.getrandbits(32) if params.seed is None else params.seed
    return [*steps, C.llama_sampler_init_dist(seed)]
