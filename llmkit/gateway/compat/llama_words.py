"""llama-server's words in OpenAI's bodies, which its clients send there too. Tornado loop only.

They are put into OpenAI's before its schema sees them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict, validated
from llmkit.gateway.compat.llama_schemas import LoraScale, scales_of, unsampled
from llmkit.gateway.exchange import Exchange

__all__ = ["translate", "understanding"]

LIMITS = ("n_predict", "max_tokens", "max_completion_tokens")
WITHOUT_EFFECT = ("response_fields", "t_max_prompt_ms", "n_keep", "n_discard", "min_keep")


class Scales(Strict):
    """Adapters, as a body names them."""

    lora: list[LoraScale] = Field(default_factory=list)


def understanding(
    run: Callable[[Exchange], Awaitable[None]],
) -> Callable[[Exchange], Awaitable[None]]:
    """A route of OpenAI's whose bodies may hold llama-server's words."""

    async def answer(exchange: Exchange) -> None:
        fields = await exchange.fields()
        given = validated(Scales, {"lora": fields.pop("lora", None)}).lora
        if given:
            exchange.lora = lambda engine: scales_of(given, engine.description)
        translate(fields, exchange.ignore)
        await run(exchange)

    return answer


def translate(fields: dict[str, Any], ignore: Callable[[str], None]) -> None:
    """Put the words of a body into OpenAI's, in place.

    >>> body = {"n_predict": -1, "samplers": ["top_k", "typ_p", "top_p", "min_p", "temperature"]}
    >>> translate(body, print)
    >>> sorted(body)
    ['dry_multiplier', 'frequency_penalty', 'presence_penalty', 'repeat_penalty', 'xtc_probability']

    ``ignore`` hears of fields without effect. Raises `InvalidRequestError`.
    """
    if "n_predict" in fields:
        given = fields.pop("n_predict")
        if "max_tokens" not in fields and "max_completion_tokens" not in fields:
            # Without an answer a prompt is only to be kept; one token does that too.
            fields["max_tokens"] = 1 if given == 0 else given
    for name in LIMITS[1:]:
        if fields.get(name) == -1:  # no limit
            del fields[name]
    for name in WITHOUT_EFFECT:
        if name in fields:
            ignore(name)
            del fields[name]
    samplers = fields.pop("samplers", None)
    if samplers is None:
        return
    if not isinstance(samplers, list) or not all(isinstance(s, str) for s in samplers):
        raise InvalidRequestError("samplers must be a list of names.", "samplers")
    fields.update(unsampled(samplers))
