"""How the next token is chosen: validated parameters and grammars. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llmkit.errors import InvalidRequestError

__all__ = ["Grammar", "SamplingParams", "check", "check_integer", "check_number"]

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 50
MAX_GRAMMAR_CHARS = 1 << 17
MAX_SEED = 2**32 - 1


def check(ok: bool, param: str, message: str) -> None:
    """Raise `InvalidRequestError` naming the parameter unless ``ok``."""
    if not ok:
        raise InvalidRequestError(f"{param} {message}", param)


def check_number(value: object, param: str, low: float, high: float) -> None:
    ok = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    )
    check(ok, param, f"must be a number from {low:g} to {high:g}, not {value!r:.50}.")


def check_integer(value: object, param: str, low: int, high: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    check(ok, param, f"must be an integer from {low} to {high}, not {value!r:.50}.")


GRAMMAR_KINDS = ("json_schema", "regex", "lark", "gbnf", "choice")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text.

    ``kind`` is json_schema, regex, lark or gbnf (``text`` is the source) or choice (``text`` is a
    JSON list of strings). ``optional``: dropped if it does not compile. ``origin`` is the
    parameter that errors name.

    >>> Grammar("regex", "[0-9]{4}").kind
    'regex'
    """

    kind: str
    text: str
    optional: bool = False
    origin: str = "grammar"

    @classmethod
    def of(
        cls,
        *,
        json_schema: Any = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
    ) -> Grammar | None:
        """The grammar of the one argument given; None without any.

        A JSON schema (a dict or a pydantic model), a regular expression, or a list of strings.

        >>> Grammar.of(choice=["yes", "no"])
        Grammar(kind='choice', text='["yes", "no"]', optional=False, origin='grammar')
        """
        sources = {"json_schema": json_schema, "regex": regex, "choice": choice}
        sources = {kind: value for kind, value in sources.items() if value is not None}
        check(len(sources) < 2, " and ".join(sources), "cannot be combined; give only one.")
        for kind, value in sources.items():
            if kind == "json_schema":
                value = (
                    _closed(value.model_json_schema())
                    if hasattr(value, "model_json_schema")
                    else value
                )
                check(
                    isinstance(value, dict | bool),
                    kind,
                    f"must be a dict or a pydantic model, not {value!r:.50}.",
                )
            elif kind == "choice":
                fine = (
                    isinstance(value, Sequence)
                    and not isinstance(value, str)
                    and len(value) > 0
                    and all(isinstance(t, str) and t for t in value)
                )
                check(fine, kind, "must be a list of non-empty strings.")
                value = list(value)
            try:
                return cls(kind, value if kind == "regex" else json.dumps(value))
            except TypeError as error:
                raise InvalidRequestError(f"{kind}: {error}", kind) from None
        return None

    def __post_init__(self) -> None:
        check(
            self.kind in GRAMMAR_KINDS,
            "grammar",
            f"kinds are {', '.join(GRAMMAR_KINDS)}, not {self.kind!r:.30}.",
        )
        check(
            isinstance(self.text, str) and 0 < len(self.text) <= MAX_GRAMMAR_CHARS,
            "grammar",
            f"must be a string of 1 to {MAX_GRAMMAR_CHARS} characters.",
        )


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def _closed(schema: Any) -> Any:
    """A pydantic model's schema, closed to fields that the model does not have."""
    if isinstance(schema, list):
        return [_closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in closed and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


RANGES: dict[str, tuple[float, float]] = {
    "dry_multiplier": (0, 100.0),
    "dry_base": (1.0, 100.0),
    "dry_allowed_length": (1, 2**20),
    "dry_penalty_last_n": (0, 2**20),
    "xtc_probability": (0, 1.0),
    "xtc_threshold": (0, 1.0),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100.0),
    "mirostat_eta": (0, 1.0),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults are llama.cpp's.

    >>> SamplingParams(temperature=0).greedy
    True

    ``max_tokens=None`` generates to the end of the context. ``seed=None`` draws a fresh one.
    ``top_k=0`` and the values 1.0 (top_p, typical_p, repetition_penalty) and 0.0 (min_p,
    presence/frequency_penalty) disable a step. ``logit_bias`` holds (token id, bias) pairs.
    ``stop`` strings may span tokens and are never part of the text. ``logprobs=k`` records the
    log-probability of each generated token and of the k likeliest, ``prompt_logprobs`` the same
    for the prompt (which is then computed in full). ``grammar`` constrains the text. ``speculate``
    allows speculative decoding where it pays; the output is the same. ``dry_*`` penalize the
    continuation of repeated sequences, ``xtc_*`` occasionally drop the likeliest tokens,
    ``mirostat`` 1 or 2 holds the surprise at ``mirostat_tau`` in place of top-k, top-p and the
    like. ``max_repetitions`` ends a text once a loop of up to 64 tokens has repeated that often
    (``finish_reason`` "repetition").
    """

    max_tokens: int | None = 256
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    speculate: bool = True
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 1024
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    max_repetitions: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.stop is None:
            object.__setattr__(self, "stop", ())
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", ())
        if isinstance(self.logit_bias, dict):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        if self.max_tokens is not None:
            check_integer(self.max_tokens, "max_tokens", 0, 2**31 - 1)
        check_number(self.temperature, "temperature", 0, 100)
        check_integer(self.top_k, "top_k", 0, 2**31 - 1)
        check_number(self.top_p, "top_p", 0, 1)
        check_number(self.min_p, "min_p", 0, 1)
        check_number(self.typical_p, "typical_p", 0, 1)
        check_number(self.repetition_penalty, "repetition_penalty", 0.01, 100)
        check_number(self.presence_penalty, "presence_penalty", -100, 100)
        check_number(self.frequency_penalty, "frequency_penalty", -100, 100)
        check_integer(self.penalty_last_n, "penalty_last_n", 0, 2**20)
        if self.seed is not None:
            check_integer(self.seed, "seed", -(2**63), 2**64)
            # llama.cpp reserves 2**32-1 for "random".
            object.__setattr__(self, "seed", self.seed % MAX_SEED)
        check(isinstance(self.stop, tuple), "stop", "must be a string or a list of strings.")
        check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"may hold at most {MAX_STOP_STRINGS} strings.",
        )
        check(
            all(isinstance(s, str) and 0 < len(s) <= 1000 for s in self.stop),
            "stop",
            "must hold strings of 1 to 1000 characters.",
        )
        check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"may hold at most {MAX_LOGIT_BIAS} tokens.",
        )
        for token, bias in self.logit_bias:
            check_integer(token, "logit_bias", 0, 2**31 - 1)
            check_number(bias, "logit_bias", -1e6, 1e6)
        check(isinstance(self.ignore_eos, bool), "ignore_eos", "must be true or false.")
        check(isinstance(self.speculate, bool), "speculate", "must be true or false.")
        for param in ("logprobs", "prompt_logprobs"):
            if getattr(self, param) is not None:
                check_integer(getattr(self, param), param, 0, MAX_LOGPROBS)
        if self.max_repetitions is not None:
            check_integer(self.max_repetitions, "max_repetitions", 2, 1000)
        for name, (low, high) in RANGES.items():
            if isinstance(high, int):
                check_integer(getattr(self, name), name, int(low), high)
            else:
                check_number(getattr(self, name), name, low, high)
        if isinstance(self.dry_sequence_breakers, list):
            object.__setattr__(self, "dry_sequence_breakers", tuple(self.dry_sequence_breakers))
        breakers = self.dry_sequence_breakers
        fine = (
            isinstance(breakers, tuple)
            and len(breakers) <= MAX_STOP_STRINGS
            and all(
                isinstance(b, str) and 0 < len(b) <= 100 and "\0" not in b and _is_unicode(b)
                for b in breakers
            )
        )
        check(
            fine,
            "dry_sequence_breakers",
            f"must hold at most {MAX_STOP_STRINGS} strings of 1 to 100 characters.",
        )
        if isinstance(self.grammar, dict):
            object.__setattr__(self, "grammar", Grammar(**self.grammar))
        check(
            self.grammar is None or isinstance(self.grammar, Grammar),
            "grammar",
            "must be a Grammar.",
        )
        check(
            not (self.grammar is not None and self.ignore_eos),
            "ignore_eos",
            "cannot be combined with a grammar, which decides where the text ends.",
        )

    @property
    def greedy(self) -> bool:
        """Whether each step takes the most probable token."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def plain_greedy(self) -> bool:
        """Greedy on unmodified logits (``ignore_eos`` aside): an argmax is enough."""
        penalties = (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.dry_multiplier != 0
        )
        return self.greedy and not (penalties or self.logit_bias)

    def as_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, JSON-ready."""
        changed = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }
        if self.grammar is not None:
            changed["grammar"] = {
                f.name: getattr(self.grammar, f.name)
                for f in fields(self.grammar)
                if getattr(self.grammar, f.name) != f.default
            }
        return changed
