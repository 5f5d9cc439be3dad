"""The fields that say how to sample, where a body has them in the engine's words. Pure."""

from __future__ import annotations

from typing import Any

from llmkit.gateway.bodies import Strict

__all__ = ["SamplingFields"]

SAME_NAME = (  # fields that the engine calls the same
    "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "seed", "ignore_eos", "speculate", "dry_multiplier", "dry_base", "dry_allowed_length",
    "dry_penalty_last_n", "dry_sequence_breakers", "xtc_probability", "xtc_threshold", "mirostat",
    "mirostat_tau", "mirostat_eta", "max_repetitions",
)  # fmt: skip


class SamplingFields(Strict):
    """``repeat_penalty`` is another name for ``repetition_penalty``."""

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

    def sampled(self) -> dict[str, Any]:
        """By the engine's parameter; None is not given."""
        penalty, stop = self.repetition_penalty, self.stop
        return {
            **{name: getattr(self, name) for name in SAME_NAME},
            "repetition_penalty": self.repeat_penalty if penalty is None else penalty,
            "penalty_last_n": self.repeat_last_n,
            "stop": (stop,) if isinstance(stop, str) else None if stop is None else tuple(stop),
        }
