"""`llm.profile()`: how fast this model is here, by prompt length and batch size. Runs over any `EngineClient`, on the caller's thread."""

from __future__ import annotations

import html
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.types import Completion, FinishReason, GenerationRequest, ModelDescription, SamplingParams

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Profile", "run"]


def run(
    client: EngineClient,
    *,
    prompt_tokens: Sequence[int] = (32, 128, 512),
    batch_sizes: Sequence[int] = (1, 4, 8),
    max_tokens: int = 32,
    seed: int = 0,
) -> Profile:
    """Measure every combination once: ``batch_size`` requests at a time, each with its own random prompt (so that no cached prefix helps), greedy, ``max_tokens`` out.

    Batch sizes above the model's slots and prompts beyond its context are left out. Raises `InvalidRequestError` when nothing is left. ■ stops it.
    """
    d = client.description
    lengths = [n for n in dict.fromkeys(prompt_tokens) if 0 < n <= d.n_ctx - max_tokens]
    sizes = [b for b in dict.fromkeys(batch_sizes) if 0 < b <= d.n_slots]
    if not lengths or not sizes or max_tokens < 2:
        raise InvalidRequestError(f"nothing to measure: prompts must leave room for max_tokens (at least 2) in {d.n_ctx} tokens, batches fit {d.n_slots} slots.")
    rng = random.Random(seed + time.time_ns())
    rows: list[dict[str, Any]] = []
    _run_batch(client, rng, 8, 1, 2)  # the first step of a context is slower
    for batch_size in sizes:
        for length in lengths:
            begin = time.perf_counter()
            done = _run_batch(client, rng, length, batch_size, max_tokens)
            wall = time.perf_counter() - begin
            rows += [_row(c, length, batch_size, i, wall) for i, c in enumerate(done)]
    return Profile(d, rows)


def _run_batch(client: EngineClient, rng: random.Random, length: int, batch_size: int, max_tokens: int) -> list[Completion]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    streams = []
    try:
        for _ in range(batch_size):
            prompt = tuple(rng.randrange(client.description.n_vocab // 100, client.description.n_vocab) for _ in range(length))
            streams.append(client.submit(GenerationRequest(f"profile-{rng.getrandbits(64):x}", params, prompt=prompt)))
        return [s.result() for s in streams]
    finally:
        for stream in streams:
            stream.close()


def _row(c: Completion, length: int, batch_size: int, index: int, wall: float) -> dict[str, Any]:
    assert c.finish_reason is FinishReason.LENGTH
    return {
        "batch_size": batch_size,
        "prompt_tokens": length,
        "request": index,
        "completion_tokens": c.usage.completion_tokens,
        "ttft_s": c.metrics.ttft_s,
        "decode_tok_s": c.decode_tok_s,
        "max_itl_s": c.metrics.max_itl_s,
        "batch_wall_s": wall,
    }


class Profile:
    """The result of `llm.profile()`.

    ``df``: one row a request (ttft_s, decode_tok_s, …). ``summary()``: one row a combination, with percentiles. ``plot()``: a picture.
    """

    def __init__(self, model: ModelDescription, rows: list[dict[str, Any]]) -> None:
        self.model = model
        self._rows = rows

    @property
    def df(self) -> pd.DataFrame:
        """Tidy: one row for each request; times in seconds, rates in tokens a second."""
        import pandas as pd

        return pd.DataFrame(self._rows)

    def summary(self) -> pd.DataFrame:
        """One row for each batch size and prompt length: TTFT p50 and p95, prefill and decode throughput of the whole batch."""
        import pandas as pd

        table = []
        for (batch_size, length), group in self.df.groupby(["batch_size", "prompt_tokens"]):
            last_first = group["ttft_s"].max()  # then the last prompt was computed
            decode_s = group["batch_wall_s"].iloc[0] - last_first
            table.append(
                {
                    "batch_size": batch_size,
                    "prompt_tokens": length,
                    "ttft_p50_s": group["ttft_s"].median(),
                    "ttft_p95_s": group["ttft_s"].quantile(0.95),
                    "prefill_tok_s": batch_size * length / last_first,
                    "decode_tok_s": (group["completion_tokens"].sum() - batch_size) / max(decode_s, 1e-9) if batch_size == 1 else _overlap_rate(group),
                    "max_itl_s": group["max_itl_s"].max(),
                }
            )
        return pd.DataFrame(table)

    def plot(self) -> Axes:
        """Two panels, prefill and decode throughput by batch size. Returns the second panel's Axes (``.figure`` has both)."""
        from llmkit.bench import plots

        return plots.profile(self.summary(), self.model.name)

    def __repr__(self) -> str:
        return f"Profile({self.model.name!r}, {len(self._rows)} requests)\n{self.summary().round(3).to_string(index=False)}"

    def _repr_html_(self) -> str:
        title = f"Profile of {self.model.name} ({self.model.quantization}, {self.model.device})"
        return f"<p>{html.escape(title)}</p>{self.summary().round(3).to_html(index=False)}"


def _overlap_rate(group: pd.DataFrame) -> float:
    """Decode throughput of a batch whose streams started one after the other: the sum of their own rates."""
    return float(group["decode_tok_s"].sum())
