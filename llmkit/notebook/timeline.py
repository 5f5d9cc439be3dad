"""Charts of an engine: its last steps (`llm.timeline()`) and its slots (`llm.kv_map()`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.notebook import charts
from llmkit.protocol import SlotContent, Step

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KVMap", "Timeline"]


class Timeline:
    """The last steps of an engine: which slots they decoded and which prompts they computed.

    ``df`` has one row per slot and step; ``plot()`` is a Gantt chart: one line per slot, one bar
    per step, prompts in orange, decodes in blue. Wide orange bars are chunks of long prompts; blue
    bars above each other are streams that advance together.
    """

    def __init__(self, name: str, steps: Sequence[Step], seconds: float | None = None) -> None:
        if seconds is not None and steps:
            steps = [s for s in steps if s.at >= -seconds]
        self.name, self._steps = name, steps

    @property
    def df(self) -> pd.DataFrame:
        """One row per slot and step; times in seconds."""
        import pandas as pd

        columns = ["step", "at_s", "seconds", "slot", "request", "tokens", "draft", "is_prompt"]
        zero = self._steps[0].at if self._steps else 0.0
        rows = [
            (
                i,
                s.at - zero,
                s.seconds,
                c.slot,
                c.request,
                c.tokens,
                c.draft,
                c.is_prompt,
            )
            for i, s in enumerate(self._steps)
            for c in s.chunks
        ]
        return pd.DataFrame(rows, columns=columns)

    def plot(self, axes: Axes | None = None) -> Axes:
        """The Gantt chart. Returns its Axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(
                figsize=(9, 0.8 + 0.3 * max(self._num_slots, 2)), layout="constrained"
            )
        self._draw(axes)
        return axes

    @property
    def _num_slots(self) -> int:
        return 1 + max((c.slot for s in self._steps for c in s.chunks), default=0)

    def _draw(self, axes: Axes) -> None:
        zero = self._steps[0].at if self._steps else 0.0
        for is_prompt, color, label in (
            (True, charts.ORANGE, "prompt"),
            (False, charts.BLUE, "decode"),
        ):
            bars: dict[int, list[tuple[float, float]]] = {}
            for step in self._steps:
                for chunk in step.chunks:
                    if chunk.is_prompt is is_prompt:
                        bars.setdefault(chunk.slot, []).append((step.at - zero, step.seconds))
            for i, (slot, spans) in enumerate(sorted(bars.items())):
                axes.broken_barh(
                    spans,
                    (slot - 0.4, 0.8),
                    facecolors=color,
                    edgecolor="white",
                    linewidth=0.3,
                    label=None if i else label,
                )
        axes.set(
            title=f"{self.name}: the last {len(self._steps)} steps",
            xlabel="seconds",
            ylabel="slot",
            ylim=(self._num_slots - 0.5, -0.5),
        )
        axes.set_yticks(range(self._num_slots))
        axes.spines[["top", "right"]].set_visible(False)
        if self._steps:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    def __repr__(self) -> str:
        frame = self.df
        if frame.empty:
            return f"Timeline({self.name!r}: nothing computed yet)"
        prompts = int(frame.tokens[frame.is_prompt].sum())
        peak = int(frame.groupby("step").size().max())
        seconds = self._steps[-1].at + self._steps[-1].seconds - self._steps[0].at
        return (
            f"Timeline({self.name!r}: {len(self._steps)} steps in {seconds:.2f} s, "
            f"{prompts} tokens of prompts, {peak} slots in a step at most)"
        )

    def _repr_png_(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure: Figure = Figure(
            figsize=(9, 0.8 + 0.3 * max(self._num_slots, 2)), layout="constrained"
        )
        self._draw(figure.add_subplot())
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
        return buffer.getvalue()


class KVMap:
    """The contents of an engine's slots.

    Tokens of running requests, cached prefixes that later requests may reuse, and prefixes that
    slots share.
    """

    def __init__(self, name: str, slots: Sequence[SlotContent], n_ctx: int) -> None:
        self.name, self.slots, self._n_ctx = name, slots, n_ctx

    @property
    def df(self) -> pd.DataFrame:
        """One row per slot.

        ``tokens`` held, ``shared`` leading ones also held by a slot before it, and the ``request``
        that uses it.
        """
        import pandas as pd

        return pd.DataFrame(
            [(s.slot, s.request, s.tokens, s.shared) for s in self.slots],
            columns=["slot", "request", "tokens", "shared"],
        )

    def _state(self, slot: SlotContent) -> str:
        return "running" if slot.request else "cached" if slot.tokens else "empty"

    def __repr__(self) -> str:
        lines = [f"KV of {self.name!r}, {self._n_ctx} tokens a slot"]
        for s in self.slots:
            contents = f"{s.tokens:6} tokens, {s.shared} shared"
            lines.append(f"  slot {s.slot}: {self._state(s):7} {contents}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for s in self.slots:
            color = charts.BLUE if s.request else charts.GREEN
            shared, own = s.shared / self._n_ctx, (s.tokens - s.shared) / self._n_ctx
            rows.append(
                charts.bar(
                    f"slot {s.slot}: {self._state(s)}",
                    f"{s.tokens} tokens",
                    [(shared, charts.PURPLE), (own, color)],
                )
            )
        legend = charts.marks(
            [
                ("running", charts.BLUE),
                ("cached for later", charts.GREEN),
                ("also in a slot before it", charts.PURPLE),
            ]
        )
        return charts.card(
            f"KV cache · {self.name}", f"{self._n_ctx} tokens a slot", [*rows, legend]
        )
