"""Charts of results; matplotlib on the caller's thread only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["comparison", "profile"]


def profile(summary: pd.DataFrame, name: str) -> Axes:
    """Prefill throughput by prompt length and decode throughput by batch size, in tokens/s."""
    import matplotlib.pyplot as plt

    left: Axes
    right: Axes
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for batch_size, group in summary.groupby("batch_size"):
        left.plot(
            group["prompt_tokens"], group["prefill_tok_s"], marker="o", label=f"batch {batch_size}"
        )
    left.set(title="Prefill", xlabel="prompt length (tokens)", ylabel="tokens / s", ylim=(0, None))
    left.legend(frameon=False)
    for length, group in summary.groupby("prompt_tokens"):
        right.plot(
            group["batch_size"], group["decode_tok_s"], marker="o", label=f"{length}-token prompts"
        )
    right.set(
        title="Decode",
        xlabel="batch size (streams)",
        ylabel="tokens / s, all streams",
        ylim=(0, None),
    )
    right.set_xticks(sorted(summary["batch_size"].unique()))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{name}: speed on this machine")
    return right


def comparison(table: pd.DataFrame) -> Axes:
    """Models side by side: speed, memory, perplexity."""
    import matplotlib.pyplot as plt

    panels = {
        "decode_tok_s": "decode (tokens / s)",
        "prefill_tok_s": "prefill (tokens / s)",
        "weights_mb": "weights (MB)",
        "perplexity": "perplexity",
    }
    names = [Path(str(name)).name for name in table.index]
    _, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.6 * len(panels), 1.2 + 0.35 * len(names)),
        layout="constrained",
        sharey=True,
    )
    for panel, (column, title) in zip(axes, panels.items(), strict=True):
        bars = panel.barh(range(len(names)), table[column], color="#3b7dd8", tick_label=names)
        panel.bar_label(bars, fmt="%.3g", padding=2)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.2)
        panel.set_xticks([])
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    last: Axes = axes[-1]
    return last
