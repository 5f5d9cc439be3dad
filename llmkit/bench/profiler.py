"""`llm.profile()`: a model's speed on this machine, by prompt length and batch size.

Works with any `EngineClient`, on the caller's thread.
"""

from __future__ import annotations

import html
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.hardware import hardware, memory_bandwidth
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Completion, GenerationRequest, ModelDescription, SamplingParams
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Profile", "run"]

_ids = itertools.count(1)


def run(
    client: EngineClient,
    *,
    prompt_tokens: Sequence[int] = (32, 128, 512),
    batch_sizes: Sequence[int] = (1, 4, 8),
    max_tokens: int = 32,
    seed: int = 0,
) -> Profile:
    """Measure every combination once: ``batch_size`` concurrent requests, random prompts, greedy.

    The first pass computes the prompts (time to first token, prefill); the second finds them cached
    and decodes ``max_tokens`` in all streams side by side.

    Batch sizes above the model's slots and prompts beyond its context are skipped. Raises
    `InvalidRequestError` when nothing is left. ■ stops it.
    """
    d = client.description
    lengths = [n for n in dict.fromkeys(prompt_tokens) if 0 < n <= d.n_ctx - max_tokens]
    sizes = [b for b in dict.fromkeys(batch_sizes) if 0 < b <= d.n_slots]
    if not lengths or not sizes or max_tokens < 2:
        raise InvalidRequestError(
            f"nothing to measure: prompts must leave room for max_tokens (at least 2) "
            f"in {d.n_ctx} tokens, batches must fit {d.n_slots} slots."
        )
    rng = random.Random(f"{seed}/{time.time_ns()}")
    rows: list[dict[str, Any]] = []
    _complete(client, _prompts(rng, d.n_vocab, 8, 1), 2)  # warm-up: the first step is slower
    for batch_size in sizes:
        for length in lengths:
            prompts = _prompts(rng, d.n_vocab, length, batch_size)
            # The second pass finds the prompts cached, so all streams decode from the start.
            computed = _complete(client, prompts, 1)
            decoded = _complete(client, prompts, max_tokens)
            rows += [
                _row(length, batch_size, i, *pair)
                for i, pair in enumerate(zip(computed, decoded, strict=True))
            ]
    return Profile(d, rows)


def _prompts(rng: random.Random, n_vocab: int, length: int, count: int) -> list[tuple[int, ...]]:
    return [
        tuple(rng.randrange(n_vocab // 100, n_vocab) for _ in range(length)) for _ in range(count)
    ]


def _complete(
    client: EngineClient, prompts: list[tuple[int, ...]], max_tokens: int
) -> list[Completion]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    streams = []
    try:
        for prompt in prompts:
            streams.append(
                client.submit(
                    GenerationRequest(
                        f"profile-{next(_ids)}-{time.time_ns()}", params, prompt=prompt
                    )
                )
            )
        return [s.result() for s in streams]
    finally:
        for stream in streams:
            stream.close()


def _row(
    length: int, batch_size: int, index: int, computed: Completion, decoded: Completion
) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "prompt_tokens": length,
        "request": index,
        "completion_tokens": decoded.usage.completion_tokens,
        "ttft_s": computed.metrics.ttft_s,
        "decode_tok_s": decoded.decode_tok_s,
        "max_itl_s": decoded.metrics.max_itl_s,
    }


class Profile:
    """The result of `llm.profile()`.

    ``df``: one row per request (ttft_s, decode_tok_s, …). ``summary()``: one row per combination,
    with percentiles. ``plot()``: a chart.
    """

    def __init__(self, model: ModelDescription, rows: list[dict[str, Any]]) -> None:
        self.model = model
        self._rows = rows

    @property
    def df(self) -> pd.DataFrame:
        """Tidy: one row per request; times in seconds, rates in tokens per second."""
        import pandas as pd

        return pd.DataFrame(self._rows)

    def summary(self) -> pd.DataFrame:
        """One row per batch size and prompt length.

        TTFT p50 and p95, prefill and decode throughput of the whole batch.
        """
        import pandas as pd

        table = []
        groups: Any = self.df.groupby(["batch_size", "prompt_tokens"])
        for (batch_size, length), group in groups:
            table.append(
                {
                    "batch_size": batch_size,
                    "prompt_tokens": length,
                    "ttft_p50_s": group["ttft_s"].median(),
                    "ttft_p95_s": group["ttft_s"].quantile(0.95),
                    "prefill_tok_s": batch_size * length / group["ttft_s"].max(),
                    "decode_tok_s": group["decode_tok_s"].sum(),
                    "max_itl_s": group["max_itl_s"].max(),
                }
            )
        return pd.DataFrame(table)

    def roofline(self) -> pd.DataFrame:
        """How close decoding comes to the limit of this machine's memory bandwidth.

        Every step reads all weights once, so steps per second cannot exceed bandwidth over their
        size. One row per batch size: bandwidth in GB/s, measured and used, and their ratio. A rough
        model: it leaves out the KV cache, and a mixture of experts does not read all its weights.
        Raises `InvalidRequestError` for a model on a GPU, whose memory it cannot measure.
        """
        import pandas as pd

        if self.model.device == "gpu":
            raise InvalidRequestError(
                "the roofline needs the CPU's memory bandwidth; this model runs on a GPU.", "device"
            )

        bandwidth = memory_bandwidth()
        best = self.summary().groupby("batch_size")["decode_tok_s"].max()
        rows = []
        for batch_size, tok_s in zip(best.index, best, strict=True):
            used = self.model.weights_bytes * tok_s / float(batch_size)
            rows.append(
                {
                    "batch_size": batch_size,
                    "decode_tok_s": tok_s,
                    "memory_gb_s": bandwidth / 1e9,
                    "used_gb_s": used / 1e9,
                    "share": used / bandwidth,
                }
            )
        return pd.DataFrame(rows).round(2)

    def save(self, path: str | Path) -> Path:
        """Write the table, with this machine's description in each row.

        The suffix chooses CSV or Parquet (which needs pyarrow).
        """
        table, path = (
            self.df.assign(
                model=self.model.name,
                quantization=self.model.quantization,
                device=self.model.device,
                **hardware(),
            ),
            Path(path),
        )
        if path.suffix == ".parquet":
            table.to_parquet(path)
        elif path.suffix == ".csv":
            table.to_csv(path, index=False)
        else:
            raise InvalidRequestError(
                f"{path.name}: results can be saved as .csv or .parquet.", "path"
            )
        return path

    def plot(self) -> Axes:
        """Two panels: prefill throughput by prompt length, decode throughput by batch size.

        Returns the second panel's Axes (``.figure`` has both).
        """
        from llmkit.bench import plots

        return plots.profile(self.summary(), self.model.name)

    def __repr__(self) -> str:
        table = self.summary().round(3).to_string(index=False)
        return f"Profile({self.model.name!r}, {len(self._rows)} requests)\n{table}"

    def _repr_html_(self) -> str:
        title = f"Profile of {self.model.name} ({self.model.quantization}, {self.model.device})"
        return f"<p>{html.escape(title)}</p>{self.summary().round(3).to_html(index=False)}"
