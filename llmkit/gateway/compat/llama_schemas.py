"""llama-server's requests for text: the schemas, and their translation. Pure.

A field is honoured or refused, but for those that say how llama-server is to compute: they are
ignored, see `llmkit.gateway.tolerance`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.chats import sampling_params
from llmkit.gateway.compat.llama_objects import RANDOM_SEED
from llmkit.protocol import Grammar, ModelDescription, SamplingParams

__all__ = [
    "InfillBody",
    "InfillChunk",
    "LlamaCompletionBody",
    "LlamaEmbeddingBody",
    "LlamaGenerationBody",
    "LoraScale",
    "Prompt",
    "adapter_names",
    "scales_of",
    "unsampled",
]

# By sampler, what each of its parameters is without it. A list of samplers leaves out the others.
WITHOUT: dict[str, dict[str, float]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
}
SPELLINGS = {"typical_p": "typ_p", "typical": "typ_p", "temp": "temperature"}
INFILL, INFILL_MIN_P = "infill", 0.2  # that sampler keeps tokens of this probability
UNKNOWN = ("top_n_sigma", "adaptive_p")  # we have none of these; by default they do nothing
NAMES = {  # what a body calls our parameters
    "max_tokens": "n_predict",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "logprobs": "n_probs",
}
SAME_NAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "xtc_probability",
    "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta", "ignore_eos",
)  # fmt: skip
NEVER = -1e6  # as a bias
Prompt = str | tuple[int, ...]
Named = Annotated[
    str, BeforeValidator(lambda m: (m.strip() or "default") if isinstance(m, str) else m)
]


def unsampled(samplers: list[str]) -> dict[str, float]:
    """The parameters of the samplers that are not in the list, as they do nothing.

    >>> unsampled(["top_k", "top_p", "min_p", "typ_p", "penalties", "dry", "xtc"])
    {'temperature': 1.0}

    Raises `InvalidRequestError` for one that we do not have.
    """
    named = [SPELLINGS.get(name, name) for name in samplers]
    for name in named:
        if name not in (*WITHOUT, *UNKNOWN, INFILL):
            raise InvalidRequestError(
                f"samplers: {name!r:.40} is not one of {', '.join((*WITHOUT, INFILL))}.", "samplers"
            )
    values = {k: v for name, without in WITHOUT.items() if name not in named
              for k, v in without.items()}  # fmt: skip
    return {**values, "min_p": INFILL_MIN_P} if INFILL in named else values


# A token's id and its bias; false is never.
Bias = Annotated[list[int | float | Literal[False]], Field(min_length=2, max_length=2)]


class LoraScale(Strict):
    id: int = -1
    scale: Annotated[float, Field(ge=-100, le=100)] = 0.0


def adapter_names(model: ModelDescription) -> list[str]:
    """What requests call the adapters of a model; llama-server calls them 0, 1 and so on."""
    return [PurePath(path).stem for path, _ in model.adapters]


def scales_of(given: Sequence[LoraScale], model: ModelDescription) -> tuple[tuple[str, float], ...]:
    """The scales of a model's adapters by name; those that are not given are off.

    Raises `InvalidRequestError`.
    """
    names, scales = adapter_names(model), {each.id: each.scale for each in given}
    for adapter, scale in scales.items():
        if scale and not 0 <= adapter < len(names):
            there = f"the ids are 0 to {len(names) - 1}" if names else "the model has none"
            raise InvalidRequestError(f"lora: there is no adapter {adapter}; {there}.", "lora")
    return tuple((names[adapter], scale) for adapter, scale in sorted(scales.items()) if scale)


class MediaPrompt(Strict):
    prompt_string: str
    multimodal_data: list[Any] | None = None


class LlamaGenerationBody(Strict):
    """What /completion and /infill share."""

    model: Named = "default"
    max_tokens: Annotated[int, Field(ge=-1)] = Field(
        -1, validation_alias=AliasChoices("n_predict", "max_completion_tokens", "max_tokens")
    )
    stream: bool = False
    n: Annotated[int, Field(ge=1, le=128)] = Field(1, validation_alias=AliasChoices("n_cmpl", "n"))
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = Field(None, validation_alias=AliasChoices("typical_p", "typ_p"))
    repeat_penalty: float | None = None
    repeat_last_n: Annotated[int, Field(ge=-1)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1)] | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    seed: int | None = None
    samplers: list[str] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: list[Bias] | dict[str, float] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    n_probs: Annotated[int, Field(ge=0, le=50)] | None = Field(
        None, validation_alias=AliasChoices("n_probs", "logprobs")
    )
    lora: list[LoraScale] | None = None
    t_max_predict_ms: Annotated[int, Field(ge=-1)] = -1
    n_indent: Annotated[int, Field(ge=0)] = 0
    response_fields: list[str] = Field(default_factory=list)
    return_tokens: bool = False
    timings_per_token: bool = False

    def sampling(self, model: ModelDescription) -> SamplingParams:
        """Raises `InvalidRequestError`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in SAME_NAME}
        values |= {
            "max_tokens": None if self.max_tokens < 0 else self.max_tokens,
            "repetition_penalty": self.repeat_penalty,
            "penalty_last_n": _last_n(self.repeat_last_n, model),
            "dry_penalty_last_n": _last_n(self.dry_penalty_last_n, model),
            "seed": None if self.seed in (None, -1, RANDOM_SEED) else self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "logit_bias": self._biases(),
            "grammar": self._grammar(),
            "logprobs": self._logprobs,
        }
        if self.samplers is not None:
            neutral = unsampled(self.samplers)
            values |= {"repetition_penalty" if k == "repeat_penalty" else k: v
                       for k, v in neutral.items()}  # fmt: skip
        return sampling_params(NAMES, **values)

    @property
    def _logprobs(self) -> int | None:
        """Streamed token ids come with log-probabilities."""
        return self.n_probs or (0 if self.return_tokens and self.stream else None)

    def _biases(self) -> tuple[tuple[int, float], ...]:
        given = self.logit_bias or []
        pairs: Iterable[Sequence[Any]] = given.items() if isinstance(given, dict) else given
        try:
            return tuple((int(t), NEVER if b is False else float(b)) for t, b in pairs)
        except ValueError:
            raise InvalidRequestError(
                "logit_bias: name tokens by their ids.", "logit_bias"
            ) from None

    def _grammar(self) -> Grammar | None:
        if self.grammar:
            return Grammar("gbnf", self.grammar)
        if self.json_schema is None:
            return None
        schema = self.json_schema or {"type": "object"}
        return Grammar("json_schema", json.dumps(schema), origin="json_schema")


def _last_n(value: int | None, model: ModelDescription) -> int | None:
    """A number of tokens; -1 is the whole context."""
    return model.n_ctx if value == -1 else value


class LlamaCompletionBody(LlamaGenerationBody):
    """POST /completion"""

    prompt: str | MediaPrompt | list[int | str | list[int | str] | MediaPrompt]

    @property
    def is_many(self) -> bool:
        """Whether the answer is a list."""
        return self.n > 1 or len(self.prompts) > 1

    @property
    def prompts(self) -> list[str | list[int | str]]:
        """Texts, or token ids and texts mixed. Raises `InvalidRequestError`."""
        given = self.prompt
        if not isinstance(given, list):
            return [_text(given)]
        if not given:
            raise InvalidRequestError("prompt must not be empty.", "prompt")
        if any(isinstance(each, int) for each in given):
            mixed = [each for each in given if isinstance(each, int | str)]
            if len(mixed) < len(given):
                raise InvalidRequestError("prompt: token ids and lists are mixed.", "prompt")
            return [mixed]
        return [each if isinstance(each, list) else _text(each) for each in given
                if not isinstance(each, int)]  # fmt: skip


def _text(prompt: str | MediaPrompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt.multimodal_data:
        raise InvalidRequestError(
            "prompt: multimodal_data is only for chats here; send pictures and sounds to "
            "/v1/chat/completions.",
            "prompt",
        )
    return prompt.prompt_string


class InfillChunk(Strict):
    text: str
    filename: str | None = None
    time: int | None = None  # llama.vscode says when it saw the chunk


class InfillBody(LlamaGenerationBody):
    """POST /infill"""

    input_prefix: str
    input_suffix: str
    input_extra: list[InfillChunk] = Field(default_factory=list)
    prompt: str = ""


class LlamaEmbeddingBody(Strict):
    """POST /embedding"""

    model: Named = "default"
    content: str | list[int] | list[str | list[int]] = Field(
        validation_alias=AliasChoices("content", "input")
    )
    embd_normalize: Literal[-1, 2] = 2

    @property
    def inputs(self) -> tuple[Prompt, ...]:
        given = self.content
        if isinstance(given, str):
            return (given,)
        if given and all(isinstance(each, int) for each in given):
            return (tuple(each for each in given if isinstance(each, int)),)
        return tuple(
            each if isinstance(each, str) else tuple(each)
            for each in given
            if not isinstance(each, int)
        )
