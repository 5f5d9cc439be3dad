"""What an operator sets for requests of every dialect: lengths of answers and prompts, and how a
request that does not say is sampled. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.failures import ApiError
from llmkit.protocol import EmbeddingRequest, GenerationRequest, Message, SamplingParams
from llmkit.settings.sampling import SAMPLING_OPTIONS

__all__ = ["Guards", "Terms"]

# By the engine's parameter: what the dialects call it.
NAMES = {
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_output_tokens", "num_predict"),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
}
ENGINES = {"repeat_penalty": "repetition_penalty"}  # by the settings' name
MAX_TOKENS = "max_tokens"


@dataclass(frozen=True, slots=True)
class Terms:
    """The lengths and the default sampling for all models, or for one.

    ``sampling`` has the names of the settings, ``params`` the engine's. ``max_repetitions`` of a
    loop end an answer. Raises
    `InvalidRequestError` naming the first that is unknown or out of range.

    >>> Terms(max_tokens_limit=100).over(Terms(sampling={"temperature": 0})).max_tokens_limit
    100
    """

    default_max_tokens: int | None = None
    max_tokens_limit: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_repetitions: int | None = None
    params: Mapping[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in self.sampling:
            if name not in SAMPLING_OPTIONS:
                known = ", ".join(SAMPLING_OPTIONS)
                message = f"sampling.{name:.60} is not a setting; the known ones are {known}."
                raise InvalidRequestError(message, name)
        params = {ENGINES.get(k, k): v for k, v in self.sampling.items() if v is not None}
        if self.max_repetitions is not None:
            params["max_repetitions"] = self.max_repetitions
        SamplingParams(**params)
        object.__setattr__(self, "params", params)

    def over(self, general: Terms) -> Terms:
        """These, and what ``general`` says where they do not."""
        default, limit = self.default_max_tokens, self.max_tokens_limit
        own = {name: value for name, value in self.sampling.items() if value is not None}
        return Terms(
            general.default_max_tokens if default is None else default,
            general.max_tokens_limit if limit is None else limit,
            {**general.sampling, **own},
            general.max_repetitions if self.max_repetitions is None else self.max_repetitions,
        )


NO_TERMS = Terms()


class Guards:
    """Applies `Terms` to requests: those of their model, by name, over the general ones.

    With ``refuses``, a request for more than the limit is refused, else given the limit.
    """

    def __init__(
        self,
        terms: Terms | None = None,
        models: Mapping[str, Terms] | None = None,
        *,
        refuses: bool = False,
        max_prompt_chars: int | None = None,
    ) -> None:
        self._general = terms or Terms()
        self._models = {n: t.over(self._general) for n, t in (models or {}).items()}
        self._refuses, self._max_chars = refuses, max_prompt_chars

    def apply(
        self, model: str, requests: Sequence[GenerationRequest], given: Collection[str] = ()
    ) -> tuple[list[GenerationRequest], int | None]:
        """The requests as they may run, and the limit if it is less than they asked for.

        ``given`` are the names of the fields that the caller sent. Raises `InvalidRequestError`,
        and `ApiError` for a prompt that is too long.
        """
        terms = self._models.get(model, self._general)
        if terms == NO_TERMS and self._max_chars is None:
            return list(requests), None
        clamped: int | None = None
        result = []
        for request in requests:
            self._check_prompt(request)
            changes = {k: v for k, v in terms.params.items() if not _is_given(k, given)}
            wanted, limit = request.sampling.max_tokens, terms.max_tokens_limit
            is_given = _is_given(MAX_TOKENS, given)
            if not is_given and terms.default_max_tokens is not None:
                changes[MAX_TOKENS] = wanted = terms.default_max_tokens
            if limit is not None and (wanted is None or wanted > limit):
                if is_given and wanted is not None and self._refuses:
                    raise self._too_many(wanted, limit, given)
                changes[MAX_TOKENS] = limit
                clamped = limit if is_given else clamped
            sampling = request.sampling
            changes = {k: v for k, v in changes.items() if getattr(sampling, k) != v}
            if changes:
                request = replace(request, sampling=replace(sampling, **changes))
            result.append(request)
        return result, clamped

    def check_texts(self, request: EmbeddingRequest) -> None:
        """Raises `ApiError` if a text is too long."""
        if self._max_chars is None:
            return
        size = max(len(text) for text in request.inputs) + len(request.query or "")
        self._check_size(size, "input")

    def _check_prompt(self, request: GenerationRequest) -> None:
        if self._max_chars is None:
            return
        if request.messages is None:
            size = len(request.prompt or ()) + len(request.suffix or "")
            self._check_size(size, "prompt")  # a token has at least a character
            return
        size = sum(_size(message) for message in request.messages)
        for tool in request.tools:
            size += len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters))
        if request.template_options:
            size += len(json.dumps(request.template_options))
        self._check_size(size, "messages")

    def _check_size(self, size: int, param: str) -> None:
        if self._max_chars is not None and size > self._max_chars:
            raise ApiError(
                400,
                f"{param}: {size} characters, and this server accepts at most {self._max_chars}. "
                "Shorten it.",
                param=param,
                code="context_length_exceeded",
            )

    @staticmethod
    def _too_many(wanted: int, limit: int, given: Collection[str]) -> InvalidRequestError:
        name = next(n for n in NAMES[MAX_TOKENS] if n in given)
        return InvalidRequestError(
            f"{name} must be at most {limit} on this server, not {wanted}.",
            "options" if name == "num_predict" else name,
        )


def _is_given(name: str, given: Collection[str]) -> bool:
    return any(each in given for each in NAMES.get(name, (name,)))


def _size(message: Message) -> int:
    """The characters of a message."""
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.text) + len(message.reasoning_content or "") + calls
