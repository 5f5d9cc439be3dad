"""How answers are sampled when a request does not say: the table ``[sampling]``. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.settings import table
from llmkit.settings.table import Option, option

__all__ = ["SAMPLING_OPTIONS", "SamplingDefaults"]

GROUP = "Sampling"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a request that does not say otherwise is sampled with; None is llama.cpp's default."""

    temperature: float | None = option(
        "number", None, "How far from the likeliest token; 0 always takes it.", GROUP,
        low=0.0, high=100.0, live=True,
    )  # fmt: skip
    top_p: float | None = option(
        "number", None, "Only the likeliest tokens that together have this probability.", GROUP,
        low=0.0, high=1.0, live=True,
    )  # fmt: skip
    top_k: int | None = option(
        "integer", None, "Only so many of the likeliest tokens; 0 is all.", GROUP,
        low=0, high=2**31 - 1, live=True,
    )  # fmt: skip
    min_p: float | None = option(
        "number", None, "Only tokens with this share of the likeliest one's probability.", GROUP,
        low=0.0, high=1.0, live=True,
    )  # fmt: skip
    repeat_penalty: float | None = option(
        "number", None, "Penalty on tokens that were there before; 1 is none.", GROUP,
        low=0.01, high=100.0, live=True,
    )  # fmt: skip
    presence_penalty: float | None = option(
        "number", None, "Penalty on tokens that the answer has already.", GROUP,
        low=-100.0, high=100.0, live=True,
    )  # fmt: skip
    frequency_penalty: float | None = option(
        "number", None, "Penalty on tokens by how often the answer has them.", GROUP,
        low=-100.0, high=100.0, live=True,
    )  # fmt: skip
    seed: int | None = option(
        "integer", None, "Same seed, same draws; by default a fresh one for each request.", GROUP,
        low=-(2**63), high=2**63 - 1, live=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        table.check(self)


SAMPLING_OPTIONS: dict[str, Option] = table.table(SamplingDefaults)
