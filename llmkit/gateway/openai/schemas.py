"""The schemas of OpenAI's completions, and of what chat shares with them.

Pure. OpenAI's fields become engine parameters here and in `chat`: a field is honoured or refused
with a 400 that names it; only those without effect (`user`, `metadata`, …) are accepted and
ignored.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.chats import sampling_params
from llmkit.gateway.openai.logprobs import text_logprobs
from llmkit.gateway.sampling_fields import SamplingFields
from llmkit.protocol import Completion, GenerationRequest, Grammar, SamplingParams

__all__ = ["MAX_TOP_LOGPROBS", "CompletionRequest", "GenerationFields", "Ignored", "Metadata"]

MAX_CHOICES = 128
MAX_PROMPTS = 512
MAX_SCORED = 4_000_000  # length of the echoed prompts times log-probabilities per token
# By the engine's parameter: the names under which callers may have sent it.
ALIASES = {
    "max_tokens": ("max_completion_tokens",),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "penalty_last_n": ("repeat_last_n",),
}
TokenIds = list[int]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
ANY_OBJECT = {"type": "object"}
MAX_TOP_LOGPROBS = 20


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Ignored(Strict):
    """Fields without effect, accepted with every request and ignored."""

    user: str | None = None
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: Literal["medium"] | None = None


class GenerationFields(SamplingFields, Ignored):
    """The fields of both endpoints, chat and completions."""

    model: str = "default"
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings_per_token: bool | None = None  # llama-server's: how fast the answer was
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    priority: Annotated[int, Field(ge=0)] | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """Parameters of all choices; the seed is the first one's. Raises `InvalidRequestError`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed when stream is true.", "stream_options"
            )
        values: dict[str, Any] = {
            **self.sampled(),
            "max_tokens": max_tokens,
            "logit_bias": _logit_bias(self.logit_bias),
            "grammar": self._grammar(),
            **self.wanted_logprobs(),
        }
        return sampling_params(self._names(), **values)

    def wanted_logprobs(self) -> dict[str, int | None]:
        """The sampling parameters ``logprobs`` and ``prompt_logprobs``."""
        return {}

    def _grammar(self) -> Grammar | None:
        """The requested constraint. Raises `InvalidRequestError` for two different ones."""
        grammars = {name: g for name, g in self._grammars().items() if g is not None}
        if len({(g.kind, g.text) for g in grammars.values()}) > 1:
            raise InvalidRequestError(
                f"{' and '.join(grammars)} cannot be combined; give one of them.",
                list(grammars)[-1],
            )
        return next(iter(grammars.values()), None)

    def _grammars(self) -> dict[str, Grammar | None]:
        form = self.response_format
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            raise InvalidRequestError("response_format: json_schema is missing.", "response_format")
        schema = (
            form.json_schema.schema_ if form is not None and form.json_schema is not None else None
        )
        return {
            "response_format": None
            if form is None or form.type == "text"
            else _schema(ANY_OBJECT if schema is None else schema, "response_format"),
            "json_schema": None
            if self.json_schema is None
            else _schema(self.json_schema, "json_schema"),
            "regex": None if self.regex is None else Grammar("regex", self.regex, origin="regex"),
            "choice": None
            if self.choice is None
            else Grammar("choice", json.dumps(self.choice), origin="choice"),
            "grammar": None
            if self.grammar is None
            else Grammar("gbnf" if "::=" in self.grammar else "lark", self.grammar),
        }

    def _names(self) -> dict[str, str]:
        """What this request calls the engine's parameters."""
        given = {
            name: next((a for a in aliases if getattr(self, a, None) is not None), None)
            for name, aliases in ALIASES.items()
        }
        return {name: alias for name, alias in given.items() if alias is not None}


def _schema(schema: Any, origin: str) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), origin=origin)


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...] | None:
    if bias is None:
        return None
    try:
        return tuple((int(token), float(value)) for token, value in bias.items())
    except ValueError:
        raise InvalidRequestError("logit_bias: keys must be token ids.", "logit_bias") from None


class CompletionRequest(GenerationFields):
    """POST /v1/completions"""

    default_max_tokens: ClassVar[int] = 16

    prompt: str | list[str] | TokenIds | list[TokenIds]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    parse_special: bool | None = None  # whether the prompt may contain control tokens (default)
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @cached_property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts as a list. Raises `InvalidRequestError` for none or too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequestError("prompt must not be empty.", "prompt")
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        if len(self.prompt) * self.per_prompt > MAX_PROMPTS:
            raise InvalidRequestError(
                f"prompt: too many; prompts times n may be at most {MAX_PROMPTS}.", "prompt"
            )
        return [p if isinstance(p, str) else tuple(p) for p in self.prompt]

    def requests(self, reply_id: str) -> list[GenerationRequest]:
        """One engine request per prompt; choice index = prompt index * n + j."""
        n, prompts = self.per_prompt, self.prompts
        if self.best_of is not None and (
            self.best_of < (self.n or 1) or (self.stream and self.best_of > (self.n or 1))
        ):
            raise InvalidRequestError(
                "best_of must be at least n, and equal to n when streaming.", "best_of"
            )
        if (
            self.echo
            and self.stream
            and (self.logprobs is not None or not all(isinstance(p, str) for p in prompts))
        ):
            raise InvalidRequestError(
                "echo cannot be streamed with logprobs or token prompts.", "echo"
            )
        if self.suffix is not None and (self.echo or not all(isinstance(p, str) for p in prompts)):
            raise InvalidRequestError(
                "suffix needs text prompts and cannot be combined with echo.", "suffix"
            )
        if self.echo and sum(map(len, prompts)) * n * ((self.logprobs or 0) + 1) > MAX_SCORED:
            raise InvalidRequestError(
                "echo: too much text to score; send fewer prompts or lower logprobs.",
                "echo",
            )
        limit = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        sampling = self.sampling(limit)
        return [
            GenerationRequest(
                f"{reply_id}-{i}",
                sampling,
                prompt=prompt,
                suffix=self.suffix,
                parse_special=self.parse_special is not False,
                priority=self.priority or 0,
                cache_salt=self.cache_salt or "",
                n=n,
            )
            for i, prompt in enumerate(prompts)
        ]

    def wanted_logprobs(self) -> dict[str, int | None]:
        # The text of an echoed token prompt comes with its log-probabilities.
        is_scored = self.echo and (
            self.logprobs is not None or not isinstance(self.prompts[0], str)
        )
        logprobs = self.logprobs
        if logprobs is None and self.per_prompt > (self.n or 1):
            logprobs = 0  # `best` needs them
        return {
            "logprobs": logprobs,
            "prompt_logprobs": (self.logprobs or 0) if is_scored else None,
        }

    @property
    def per_prompt(self) -> int:
        """Completions generated per prompt; ``n`` of them are returned."""
        return self.best_of or self.n or 1

    def best(self, completions: list[Completion]) -> list[Completion]:
        """Per prompt the ``n`` completions with the highest mean log-probability."""
        n, per_prompt = self.n or 1, self.per_prompt
        if per_prompt == n:
            return completions

        def score(c: Completion) -> float:
            return sum(p.logprob or 0.0 for p in c.logprobs) / max(len(c.logprobs), 1)

        return [
            c
            for start in range(0, len(completions), per_prompt)
            for c in sorted(completions[start : start + per_prompt], key=score, reverse=True)[:n]
        ]

    def echo_text(self, index: int, completion: Completion | None = None) -> str:
        """The prompt that choice ``index`` starts with; empty without ``echo``."""
        prompt = self.prompts[index // (self.n or 1)]
        if not self.echo:
            return ""
        return (
            prompt
            if isinstance(prompt, str)
            else b"".join(e.piece for e in completion.prompt_logprobs).decode("utf-8", "replace")
            if completion
            else ""
        )

    def choice_logprobs(self, completion: Completion) -> dict[str, Any] | None:
        """``logprobs`` of a choice, after those of an echoed prompt."""
        if self.logprobs is None:
            return None
        return text_logprobs(
            [*(completion.prompt_logprobs if self.echo else ()), *completion.logprobs]
        )
