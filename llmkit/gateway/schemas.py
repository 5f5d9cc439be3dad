"""OpenAI's words, and nobody else's: request schemas, and the objects that answers are made of. What a field means is translated here, once.

A parameter is honoured or refused with a 400 that names it; none is ignored but those that ask nothing of a server (`user`, `metadata`, …).
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cached_property
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from llmkit.errors import InvalidRequestError
from llmkit.gateway.logprobs import text_logprobs
from llmkit.types import MAX_DEPTH, Completion, GenerationRequest, Grammar, SamplingParams, depth_of

__all__ = [
    "CompletionRequest",
    "Ignored",
    "Metadata",
    "Strict",
    "parse",
    "parse_json",
    "validated",
]

LEGACY_MAX_TOKENS = 16
MAX_CHOICES = 128
MAX_KEYS = 5000
MAX_DIGITS = 400  # the largest double has 309
MAX_PROMPTS = 512
MAX_SCORED = 4_000_000
# Where a field has several spellings: ours, and what callers may have written.
ALIASES = {
    "max_tokens": ("max_completion_tokens",),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "penalty_last_n": ("repeat_last_n",),
}
RARE = (
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_probability", "xtc_threshold",
    "mirostat", "mirostat_tau", "mirostat_eta", "max_repetitions",
)  # fmt: skip
TokenIds = list[int]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)]
ANY_OBJECT = {"type": "object"}
MAX_TOP_LOGPROBS = 20
Schema = TypeVar("Schema", bound=BaseModel)


class Strict(BaseModel):
    """Fields as they are declared, no others; one that is null is one that is not given, known to us or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A list is read up to its first fault: a megabyte of faults would be a gigabyte of errors."""
        schema = handler(source)
        places: list[Any] = [schema]
        while places:
            place = places.pop()
            if isinstance(place, dict) and place.get("type") == "list":
                place["fail_fast"] = True
            places += place.values() if isinstance(place, dict) else place if isinstance(place, list | tuple) else ()
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


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
    """What asks nothing of a server, and may come with every request."""

    user: str | None = None
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: Literal["medium"] | None = None


class GenerationFields(Ignored):
    """What both endpoints take."""

    model: str = "default"
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    speculate: bool | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    max_repetitions: int | None = None
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
        """Parameters of all choices; a seed is that of the first. Raises `InvalidRequestError`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed when stream is true.", "stream_options")
        values: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty if self.repetition_penalty is not None else self.repeat_penalty,
            "penalty_last_n": self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "stop": None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "logit_bias": _logit_bias(self.logit_bias),
            "ignore_eos": self.ignore_eos,
            "speculate": self.speculate,
            "grammar": self._grammar(),
            **{name: getattr(self, name) for name in RARE},
            **self.wanted_logprobs(),
        }
        given = {k: v for k, v in values.items() if v is not None}
        try:
            return SamplingParams(**{"max_tokens": None, **given})
        except InvalidRequestError as error:
            raise self._in_callers_words(error) from None

    def wanted_logprobs(self) -> dict[str, int | None]:
        """``logprobs`` and ``prompt_logprobs`` of the sampling parameters."""
        return {}

    def _grammar(self) -> Grammar | None:
        """The one constraint that is asked for. Raises `InvalidRequestError` for two that differ."""
        found = {name: grammar for name, grammar in self._grammars().items() if grammar is not None}
        if len(set(found.values())) > 1:
            raise InvalidRequestError(f"{' and '.join(found)} cannot be combined; give one of them.", list(found)[-1])
        return next(iter(found.values()), None)

    def _grammars(self) -> dict[str, Grammar | None]:
        form = self.response_format
        if form is not None and form.type == "json_schema" and form.json_schema is None:
            raise InvalidRequestError("response_format: json_schema is missing.", "response_format")
        schema = form.json_schema.schema_ if form is not None and form.json_schema is not None else None
        return {
            "response_format": None if form is None or form.type == "text" else _schema(ANY_OBJECT if schema is None else schema),
            "json_schema": None if self.json_schema is None else _schema(self.json_schema),
            "regex": None if self.regex is None else Grammar("regex", self.regex),
            "choice": None if self.choice is None else Grammar("choice", json.dumps(self.choice)),
            "grammar": None if self.grammar is None else Grammar("gbnf" if "::=" in self.grammar else "lark", self.grammar),
        }

    def _request(self, request_id: str, n: int, max_tokens: int | None, **prompt: Any) -> GenerationRequest:
        return GenerationRequest(request_id, self.sampling(max_tokens), priority=self.priority or 0, cache_salt=self.cache_salt or "", n=n, **prompt)

    def _in_callers_words(self, error: InvalidRequestError) -> InvalidRequestError:
        """The same error, naming the field as the caller spelled it."""
        name = next((alias for alias in ALIASES.get(error.param or "", ()) if getattr(self, alias, None) is not None), None)
        return InvalidRequestError(str(error).replace(error.param or "", name, 1), name) if name else error


def _schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...] | None:
    if bias is None:
        return None
    try:
        return tuple((int(token), float(value)) for token, value in bias.items())
    except ValueError:
        raise InvalidRequestError("logit_bias: the keys must be token ids.", "logit_bias") from None


class CompletionRequest(GenerationFields):
    """POST /v1/completions"""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    parse_special: bool | None = None  # whether the prompt spells control tokens; it does, unless this is false
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @cached_property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one by one. Raises `InvalidRequestError` for none, or too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequestError("prompt must not be empty.", "prompt")
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        if len(self.prompt) * self.per_prompt > MAX_PROMPTS:
            raise InvalidRequestError(f"prompt: at most {MAX_PROMPTS} prompts times n in one request.", "prompt")
        return [p if isinstance(p, str) else tuple(p) for p in self.prompt]

    def requests(self, reply_id: str) -> list[GenerationRequest]:
        """One engine request for each prompt; choice index = prompt index x n + j."""
        n, prompts = self.per_prompt, self.prompts
        if self.best_of is not None and (self.best_of < (self.n or 1) or (self.stream and self.best_of > (self.n or 1))):
            raise InvalidRequestError("best_of must be n or more, and must equal n when streaming.", "best_of")
        if self.echo and self.stream and (self.logprobs is not None or not all(isinstance(p, str) for p in prompts)):
            raise InvalidRequestError("echo cannot be streamed with logprobs or token prompts; leave stream out.", "echo")
        if self.suffix is not None and (self.echo or not all(isinstance(p, str) for p in prompts)):
            raise InvalidRequestError("suffix goes with prompts that are texts, and without echo.", "suffix")
        if self.echo and sum(map(len, prompts)) * n * ((self.logprobs or 0) + 1) > MAX_SCORED:
            raise InvalidRequestError("echo: these are too many prompts to be scored in one request; send fewer, or ask for fewer logprobs.", "echo")
        limit = LEGACY_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        about: dict[str, Any] = {"suffix": self.suffix, "parse_special": self.parse_special is not False}
        return [self._request(f"{reply_id}-{i}", n, limit, prompt=prompt, **about) for i, prompt in enumerate(prompts)]

    def wanted_logprobs(self) -> dict[str, int | None]:
        # The text of a token prompt is known from its scores.
        scored = self.echo and (self.logprobs is not None or not isinstance(self.prompts[0], str))
        own = 0 if self.logprobs is None and self.per_prompt > (self.n or 1) else self.logprobs  # the best is chosen by them
        return {"logprobs": own, "prompt_logprobs": (self.logprobs or 0) if scored else None}

    @property
    def per_prompt(self) -> int:
        """Completions that are made of each prompt; ``n`` of them are returned."""
        return self.best_of or self.n or 1

    def best(self, completions: list[Completion]) -> list[Completion]:
        """The ``n`` of each prompt whose tokens are likeliest on average."""
        n, made = self.n or 1, self.per_prompt
        if made == n:
            return completions

        def score(c: Completion) -> float:
            return sum(p.logprob or 0.0 for p in c.logprobs) / max(len(c.logprobs), 1)

        return [c for at in range(0, len(completions), made) for c in sorted(completions[at : at + made], key=score, reverse=True)[:n]]

    def echo_text(self, index: int, completion: Completion | None = None) -> str:
        """What choice ``index`` begins with."""
        prompt = self.prompts[index // (self.n or 1)]
        if not self.echo:
            return ""
        return prompt if isinstance(prompt, str) else b"".join(e.piece for e in completion.prompt_logprobs).decode("utf-8", "replace") if completion else ""

    def choice_logprobs(self, completion: Completion) -> dict[str, Any] | None:
        """``logprobs`` of a choice, the prompt's first where it is echoed."""
        if self.logprobs is None:
            return None
        return text_logprobs([*(completion.prompt_logprobs if self.echo else ()), *completion.logprobs])


def parse(schema: type[Schema], body: bytes) -> Schema:
    """A request body as its schema.

    Raises `InvalidRequestError` that names the first field that is wrong.
    """
    return validated(schema, parse_json(body))


def parse_json(body: bytes) -> dict[str, Any]:
    """A request body as an object. Raises as `parse` does."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and depth_of(data) > MAX_DEPTH:
        raise InvalidRequestError(f"The body is nested too deeply; at most {MAX_DEPTH} levels are read.")
    if body.count(b":") > MAX_KEYS and _most_keys(data) > MAX_KEYS:
        raise InvalidRequestError(f"The body holds an object of more than {MAX_KEYS} fields.")
    return data


def _most_keys(value: Any) -> int:
    """The size of the largest object in a value."""
    most, level = 0, [value]
    while level:
        most = max([most, *(len(x) for x in level if isinstance(x, dict))])
        level = [v for x in level if isinstance(x, list | dict) for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, list | dict)]
    return most


def validated(schema: type[Schema], data: dict[str, Any]) -> Schema:
    """Fields as a schema. Raises as `parse` does."""
    try:
        return schema.model_validate(data)
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except ValidationError as error:
        # Of a field that may be one of several things, the one that fits best got furthest.
        first = max(error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"]))
        where, last = first["loc"][:-1], first["loc"][-1:]  # names of types stand in the middle; what was sent may look like one
        loc = [part for part in where if isinstance(part, int) or not re.fullmatch(r"str|int|[A-Z]\w*|.*\[.*", part)]
        loc += last if first["type"] == "extra_forbidden" else [p for p in last if isinstance(p, int) or not re.fullmatch(r"str|int|[A-Z]\w*|.*\[.*", p)]
        param = next((str(part) for part in loc if isinstance(part, str)), None)
        place = ".".join(map(str, loc))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(place, schema.model_fields, n=1) if len(loc) == 1 and len(place) < 100 else []
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidRequestError(f"Unrecognized or unsupported parameter: {place:.200}.{hint}", param) from None
        raise InvalidRequestError(f"{place:.200}: {first['msg']}", param) from None


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.30} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:  # reading them takes the square of their number
        raise ValueError(f"{text:.30}… is too large a number")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
