"""Counters of the engine thread, read by other threads as frozen snapshots."""

from __future__ import annotations

from llmkit.engine.budget import StepClock
from llmkit.engine.scheduler import Scheduler
from llmkit.engine.slots import PrefixCache
from llmkit.protocol import EngineStats

__all__ = ["StatsCounter"]


class StatsCounter:
    """Counts what the engine does; ``snapshot`` is replaced as a whole, so readers need no lock."""

    def __init__(
        self, cache: PrefixCache, scheduler: Scheduler, capacity: int, clock: StepClock
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._scheduler = scheduler
        self._capacity = capacity
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = self.requests = (
            self.steps
        ) = self.busy_slots = self.media = 0
        self.step_s = self.backend_s = 0.0
        self.snapshot = self._take()

    def refresh(self) -> None:
        """Publish a new snapshot."""
        self.snapshot = self._take()

    def _take(self) -> EngineStats:
        slots = self._cache.slots
        used = sum(len(s.tokens) for s in slots if s.busy)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_used_tokens=used,
            kv_cached_tokens=sum(len(s.tokens) for s in slots) - used,
            kv_capacity_tokens=self._capacity,
            num_slots=self._scheduler.max_running,
            prompt_tokens_total=self.prompt_tokens,
            cached_tokens_total=self.cached_tokens,
            generation_tokens_total=self.generation_tokens,
            requests_total=self.requests,
            preemptions_total=self._scheduler.num_preemptions,
            draft_tokens_total=self._scheduler.num_drafted,
            accepted_tokens_total=self._scheduler.num_accepted,
            host_cached_tokens=self._cache.num_parked_tokens,
            steps_total=self.steps,
            step_seconds_total=self.step_s,
            backend_seconds_total=self.backend_s,
            busy_slots_total=self.busy_slots,
            drafts_total=self._scheduler.num_drafts,
            prompt_token_s=self._clock.prompt_token_s,
            decode_step_s=self._clock.step_s(len(self._scheduler.running)),
            num_parked=len(self._cache.parked),
            media_total=self.media,
            encoded_total=self._scheduler.encodings.num_encoded,
            encode_seconds_total=self._scheduler.encodings.seconds,
            num_encoding=self._scheduler.num_encoding,
            encoded_bytes=self._scheduler.encodings.num_bytes,
        )
