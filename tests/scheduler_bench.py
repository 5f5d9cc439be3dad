"""A scheduler that tests drive step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fake_runner import END, FakeRunner, piece

from llmkit.engine.budget import StepClock
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.encoding import Encodings
from llmkit.engine.integrity import check
from llmkit.engine.request import Request
from llmkit.engine.scheduler import Scheduler
from llmkit.engine.slots import PrefixCache
from llmkit.protocol import SamplingParams
from llmkit.protocol.stream import Channel

_ids = itertools.count()


class Bench:
    """A scheduler and a runner without the engine's thread: ``step()`` is one step, with its books
    checked."""

    def __init__(
        self,
        runner: FakeRunner,
        target_s: float | None = None,
        deterministic: bool = False,
        shifts: bool = False,
        max_running: int | None = None,
        encodings: Encodings | None = None,
    ) -> None:
        self.runner = runner
        self.shifts = shifts
        self.cache = PrefixCache(
            runner.n_slots,
            can_truncate=runner.can_truncate,
            can_fork=runner.can_fork,
            host_tokens=runner.host_tokens,
        )
        self.clock = StepClock(target_s)
        self.scheduler = Scheduler(
            self.cache,
            n_ctx=runner.n_ctx,
            max_batch_tokens=runner.max_batch_tokens,
            is_end=lambda t: t == END,
            clock=self.clock,
            capacity=runner.capacity,
            tile=runner.tile,
            can_coalesce=runner.can_fork and runner.can_truncate,
            can_draft=runner.can_truncate,
            deterministic=deterministic,
            context_shift=shifts,
            max_running=max_running,
            encodings=encodings,
        )
        self.ended: list[Request] = []

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        prompt_logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs
        )
        shifts = self.shifts and not options.get("media")
        room = max_tokens if shifts else self.runner.n_ctx - len(prompt)
        channel = Channel(f"r{next(_ids)}", lambda _: None)
        request = Request(
            list(prompt), params, min(max_tokens, room), Detokenizer(piece), channel, **options
        )
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        batch = self.scheduler.schedule()
        assert len(self.scheduler.running) <= self.scheduler.max_running
        news = self.scheduler.update(batch, self.runner.execute(batch))
        self.note(news)
        return news

    def note(self, news: list[Request]) -> None:
        for request in news:
            request.publish()
        self.ended += [r for r in news if r.finish_reason is not None]
        check(self.scheduler)
        for slot in self.cache.slots:
            assert slot.tokens == self.runner.slots[slot.index] or any(
                getattr(op, "slot", None) == slot.index for op in self.scheduler._pending
            )

    def drain(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "it never ends"

    def abort(self, request: Request) -> None:
        self.note(self.scheduler.abort([request.request_id]))

    def text(self, request: Request) -> bytes:
        assert request.channel.result is not None
        return request.channel.result.text.encode()
