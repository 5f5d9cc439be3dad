"""The stage that holds callers to their rates and budgets. Tornado loop only.

Requests that compute count; a look at models or status does not, nor does cancelling an answer.
Requests at once are bounded by `llmkit.gateway.access.overload`, which knows how long they take.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from llmkit.gateway.access.clock import SteadyClock
from llmkit.gateway.access.computing import COMPUTING
from llmkit.gateway.access.identity import Allowance
from llmkit.gateway.access.windows import Standing, Windows, rate_of
from llmkit.gateway.failures import NO_RETRY, ApiError
from llmkit.protocol.speech import SOUND_TOKENS
from llmkit.store.records import Spending

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange
    from llmkit.gateway.pipeline import Stage
    from llmkit.gateway.record import Record
    from llmkit.protocol import GenerationRequest
    from llmkit.store.usage import UsageWriter

__all__ = ["duration", "limiting", "spending_of"]

# Estimates, for prompts that the engine did not count.
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_FILE = 256


def limiting(
    windows: Windows, usage: UsageWriter | None = None, clock: SteadyClock | None = None
) -> Stage:
    """A stage that refuses what an `Allowance` does not cover, and says what is left.

    Nothing is reserved: a request is charged when it has ended, so those that run when a budget is
    used up may overdraw it. Without ``usage`` there are no budgets, and nothing is written down.
    """
    time_of_day = clock or SteadyClock()

    @contextlib.asynccontextmanager
    async def stage(exchange: Exchange) -> AsyncIterator[None]:
        if exchange.method != "POST" or exchange.route not in COMPUTING:
            yield
            return
        allowance = exchange.identity.allowance
        if usage is not None:
            _check_budget(exchange, allowance, usage, time_of_day)
        if allowance.rate is not None:
            standing = await windows.take(rate_of(allowance.rate), exchange.counted_as)
            _say_requests(exchange, standing)
        try:
            yield
        finally:
            if usage is not None and exchange.record.model:
                spending = spending_of(exchange.record)
                usage.add(exchange.identity.name, exchange.record.model, spending)

    return stage


def _say_requests(exchange: Exchange, standing: Standing) -> None:
    """Raises `ApiError` for a request that is one too many."""
    _say(exchange, "requests", standing.rate.amount, standing.remaining, standing.reset_s)
    if standing.is_allowed:
        return
    amount, span = standing.rate.amount, duration(standing.rate.seconds)
    raise ApiError(
        429,
        f"The limit of {amount} requests in {span} is reached; "
        f"try again in {duration(math.floor(standing.reset_s) + 1)}.",
        "rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(math.floor(standing.reset_s) + 1)},
    )


def _check_budget(
    exchange: Exchange, allowance: Allowance, usage: UsageWriter, clock: SteadyClock
) -> None:
    per_day, per_month = allowance.tokens_per_day, allowance.tokens_per_month
    if allowance.tokens_in_24h is not None:
        _check_window(exchange, allowance.tokens_in_24h, usage, clock)
    if per_day is None and per_month is None:
        return
    in_day, in_month = usage.tokens(exchange.identity.name, clock.today())
    budgets = []
    if per_day is not None:
        budgets.append((per_day - in_day, per_day, clock.left_of_day(), "day"))
    if per_month is not None:
        budgets.append((per_month - in_month, per_month, clock.left_of_month(), "month"))
    # The tighter one counts; of two that are used up, the one that lasts longer.
    left, most, reset_s, span = min(budgets, key=lambda b: (max(0, b[0]), -b[2]))
    _say(exchange, "tokens", most, max(0, left), reset_s)
    if left > 0:
        return
    what = f"The budget of {most} tokens a {span} is used up; it is renewed at"
    raise _used_up(what, reset_s, clock)


def _check_window(exchange: Exchange, most: int, usage: UsageWriter, clock: SteadyClock) -> None:
    used, reset_s = usage.in_window(exchange.identity.name, most)
    _say(exchange, "tokens", most, max(0, most - used), reset_s)
    if used >= most:
        what = f"The quota of {most} tokens in 24 hours is used up; there is room again at"
        raise _used_up(what, reset_s, clock)


def _used_up(what: str, reset_s: float, clock: SteadyClock) -> ApiError:
    renewed = datetime.fromtimestamp(clock.now() + reset_s, UTC)
    return ApiError(
        429,
        f"{what} {renewed:%Y-%m-%dT%H:%M:%SZ}.",
        "insufficient_quota",
        code="insufficient_quota",
        headers={"Retry-After": str(math.ceil(reset_s)), **NO_RETRY},
    )


def _say(exchange: Exchange, what: str, limit: int, remaining: int, reset_s: float) -> None:
    exchange.set_header(f"x-ratelimit-limit-{what}", str(limit))
    exchange.set_header(f"x-ratelimit-remaining-{what}", str(remaining))
    exchange.set_header(f"x-ratelimit-reset-{what}", duration(reset_s))


def duration(seconds: float) -> str:
    """A span as OpenAI writes it.

    >>> duration(360), duration(1), duration(0.02), duration(3725)
    ('6m0s', '1s', '20ms', '1h2m5s')
    """
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def spending_of(record: Record) -> Spending:
    """What a request cost.

    Answers that have not ended, whyever, cost what has arrived of them, and their prompts by
    estimate: the engine counts only what it finishes. What it refused costs nothing.
    """
    usage = record.usage
    most = math.inf if record.engine is None else record.engine.description.n_ctx
    left = record.unfinished.values()
    # The context of a model that hears is that of its text.
    heard = sum(request.hearing is not None for request in left) * record.heard_s * SOUND_TOKENS
    prompts = [_prompt_tokens(request) for request in left if request.hearing is None]
    prompts += [_num_tokens(text) for text in record.unfinished_texts]
    return Spending(
        1,
        usage.prompt_tokens + int(sum(min(most, tokens) for tokens in prompts)) + round(heard),
        usage.cached_tokens,
        usage.completion_tokens + record.num_unfinished_tokens,
        time.monotonic() - record.started_at,
    )


def _prompt_tokens(request: GenerationRequest) -> int:
    """An estimate of the tokens of a prompt."""
    if request.saying is not None:
        return len(request.prompt or "")  # characters, as the engine counts them
    if request.prompt is not None:
        return _num_tokens(request.prompt)
    texts = "".join(message.text for message in request.messages or ())
    return _num_tokens(texts) + TOKENS_PER_FILE * len(request.media)


def _num_tokens(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else len(text) // CHARACTERS_PER_TOKEN
