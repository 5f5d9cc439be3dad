"""`llm.monitor()`: a live panel of an engine's counters.

A thread samples them and sets one widget trait, so the panel updates without kernel messages.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from llmkit.errors import EngineGoneError, LLMKitError
from llmkit.notebook import charts
from llmkit.protocol import EngineStats, Inquiry, ListRequests, RunningRequest
from llmkit.protocol.client import EngineClient

__all__ = ["GpuMemory", "Monitor", "Sample", "watch"]

HISTORY = 120
MAX_ROWS = 8
ELSEWHERE = "not measured: on another host"
MEMORY_PARTS = (
    ("weights", "weights", charts.BLUE),
    ("kv", "KV", charts.PURPLE),
    ("compute", "compute", charts.GREEN),
)


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The memory of one GPU, in bytes."""

    name: str
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of the engine and its process.

    Rates in tokens per second since the last sample, running requests, memory in bytes
    (``rss_bytes`` is None for a model on another host; ``gpus`` is empty without a GPU or for
    another process).
    """

    stats: EngineStats
    decode_tok_s: float
    rss_bytes: int | None
    total_ram_bytes: int
    gpus: tuple[GpuMemory, ...] = ()
    requests: tuple[RunningRequest, ...] = ()

    @property
    def vram(self) -> tuple[int, int] | None:
        """Used and total bytes of all GPUs; None without one."""
        if not self.gpus:
            return None
        return sum(g.used_bytes for g in self.gpus), sum(g.total_bytes for g in self.gpus)


class Monitor:
    """A panel that updates itself, even while a cell is busy, until ``stop()`` or ``unload()``.

    Displays as a widget, as static HTML where there are no widgets, and as text. ``sample()`` has
    the numbers.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        interval: float = 0.5,
        gpus: Callable[[], Sequence[GpuMemory]] = tuple,
    ) -> None:
        self._client = client
        self._interval = min(max(interval, 0.25), 60)
        self._gpus = gpus
        origin = client.origin
        is_here = origin.kind in ("kernel", "process") and origin.pid is not None
        try:
            self._process = psutil.Process(origin.pid) if is_here else None
        except psutil.Error:
            raise EngineGoneError(
                f"the process of the model {client.description.name!r} has ended; load it again."
            ) from None
        self._total_ram = int(psutil.virtual_memory().total)
        self._rates: deque[float] = deque([0.0], maxlen=HISTORY)
        self._kv: deque[float] = deque([0.0], maxlen=HISTORY)
        self._before = client.stats()
        self._before_at = time.monotonic()
        self._stopped = threading.Event()
        self._widget: Any = None
        self._last = self._take()
        self._thread = threading.Thread(target=self._run, name="llmkit-monitor", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the panel still updates."""
        return not self._stopped.is_set()

    def sample(self) -> Sample:
        """The latest sample."""
        return self._last

    def stop(self) -> None:
        """Stop updating; the last state stays visible."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(1)
        with contextlib.suppress(LLMKitError, psutil.Error):
            self._last = self._take()
        self._show()

    def _take(self) -> Sample:
        stats, now = self._client.stats(), time.monotonic()
        rate = (stats.generation_tokens_total - self._before.generation_tokens_total) / max(
            now - self._before_at, 1e-3
        )
        self._before, self._before_at = stats, now
        self._rates.append(rate)
        self._kv.append(stats.kv_usage)
        if self._client.state.is_gone:
            raise EngineGoneError(self._client.state.reason or "the engine has ended")
        return Sample(
            stats,
            rate,
            None if self._process is None else max(1, int(self._process.memory_info().rss)),
            self._total_ram,
            tuple(self._gpus()),
            self._requests(stats),
        )

    def _requests(self, stats: EngineStats) -> tuple[RunningRequest, ...]:
        """The running requests; the engine is queried only if there are any."""
        if not stats.num_running:
            return ()
        try:
            inquiry = Inquiry(f"monitor-{id(self)}", ListRequests())
            return self._client.inquire(inquiry).result(0.25)
        except (LLMKitError, TimeoutError):  # a busy cell, or an embedding model
            return ()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                try:
                    sample = self._take()
                except (LLMKitError, psutil.Error):
                    break
                self._last = sample
                self._show()
        finally:
            self._stopped.set()
            self._show()

    def _show(self) -> None:
        widget = self._widget
        if widget is not None:
            with contextlib.suppress(Exception):  # a closed frontend must not end the thread
                widget.value = self.html()

    def html(self) -> str:
        """The current panel as HTML with inline SVG."""
        s, d = self._last, self._client.description
        stats = s.stats
        parts = [
            charts.sparkline("tokens / s", f"{s.decode_tok_s:.0f}", list(self._rates), charts.BLUE),
            charts.sparkline(
                "KV cache",
                f"{stats.kv_used_tokens} of {stats.kv_capacity_tokens} tokens",
                list(self._kv),
                charts.PURPLE,
                top=1.0,
            ),
            charts.bar(
                "slots: running / waiting",
                f"{stats.num_running} of {stats.num_slots} / {stats.num_waiting}",
                [(stats.num_running / max(stats.num_slots, 1), charts.GREEN)],
            ),
            *self._memory(s),
            charts.bar(
                "prompt cache",
                f"{stats.cached_tokens_total} of {stats.prompt_tokens_total}",
                [(stats.cached_tokens_total / max(stats.prompt_tokens_total, 1), charts.GREEN)],
            ),
            self._table(s),
        ]
        return charts.card(f"llmkit · {d.name}", "live" if self.running else "stopped", parts)

    @staticmethod
    def _table(s: Sample) -> str:
        """One row per running request."""
        heads = ("slot", "from", "prompt", "cached", "made", "seconds")
        rows = [
            (
                r.slot,
                r.caller or "this notebook",
                r.prompt_tokens,
                r.cached_tokens,
                "encoding" if r.is_encoding else r.output_tokens,
                f"{r.seconds:.1f}",
            )
            for r in s.requests[:MAX_ROWS]
        ]
        more = f", {len(s.requests) - MAX_ROWS} more" if len(s.requests) > MAX_ROWS else ""
        return charts.table(f"running requests{more}", heads, rows, "none")

    def _memory(self, s: Sample) -> list[str]:
        """Bars of the memory in use, or why it is not known."""
        d = self._client.description
        if s.rss_bytes is None:
            return [charts.bar("memory", ELSEWHERE, [])]
        if s.vram is not None:
            vram = self._memory_bar("VRAM", *s.vram, d.device_bytes, "others")
        else:
            why = "not measured" if d.device == "gpu" else "none: CPU only"
            vram = charts.bar("VRAM", why, [])
        ram = self._memory_bar("RAM", s.rss_bytes, s.total_ram_bytes, self._in_ram(), "rest")
        return [ram, vram, *(self._gpu_bar(gpu) for gpu in s.gpus if len(s.gpus) > 1)]

    def _gpu_bar(self, gpu: GpuMemory) -> str:
        """One of several GPUs: this model's part of what is used."""
        mine = self._client.description.gpu_bytes.get(gpu.name, 0)
        return charts.bar(
            gpu.name,
            f"{charts.size_text(gpu.used_bytes)} of {charts.size_text(gpu.total_bytes)}",
            [
                (mine / max(gpu.used_bytes, 1), charts.BLUE),
                (max(0, gpu.used_bytes - mine) / max(gpu.used_bytes, 1), charts.ORANGE),
            ],
            legend=[(f"this model {charts.size_text(mine)}", charts.BLUE)],
        )

    def _in_ram(self) -> dict[str, int]:
        """Bytes per kind of memory that is not on a GPU."""
        d = self._client.description
        whole = {"weights": d.weights_bytes, "kv": d.kv_bytes, "compute": d.compute_bytes}
        return {kind: max(0, size - d.device_bytes.get(kind, 0)) for kind, size in whole.items()}

    @staticmethod
    def _memory_bar(title: str, used: int, total: int, parts: dict[str, int], rest: str) -> str:
        """Used memory by purpose; the whole bar is what is used."""
        sizes = [(name, parts.get(kind, 0), color) for kind, name, color in MEMORY_PARTS]
        sizes.append((rest, max(0, used - sum(size for _, size, _ in sizes)), charts.ORANGE))
        return charts.bar(
            title,
            f"{charts.size_text(used)} of {charts.size_text(total)}",
            [(size / max(used, 1), color) for _, size, color in sizes],
            legend=[
                (f"{name} {charts.size_text(size)}", color) for name, size, color in sizes if size
            ],
        )

    def __repr__(self) -> str:
        s = self._last
        if s.vram is not None:
            vram = f"VRAM {charts.size_text(s.vram[0])} of {charts.size_text(s.vram[1])}"
            if len(s.gpus) > 1:
                vram += f" on {len(s.gpus)} GPUs"
        else:
            vram = "VRAM not measured" if self._client.description.device == "gpu" else "CPU only"
        memory = (
            f"memory {ELSEWHERE}"
            if s.rss_bytes is None
            else f"RAM {charts.size_text(s.rss_bytes)}, {vram}"
        )
        return (
            f"Monitor({self._client.description.name!r}, {'live' if self.running else 'stopped'}: "
            f"{s.decode_tok_s:.0f} tokens/s, "
            f"{s.stats.num_running} running, {s.stats.num_waiting} waiting, "
            f"KV {s.stats.kv_used_tokens} of {s.stats.kv_capacity_tokens} tokens, "
            f"{memory})"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.html()}
        try:
            import ipywidgets
        except ImportError:
            return bundle
        if self._widget is None:
            self._widget = ipywidgets.HTML(self.html())
        view = self._widget._repr_mimebundle_() or {}
        return {**view, **bundle}


def watch(client: EngineClient, interval: float) -> Monitor:
    """A monitor of an engine, which may run in another process."""
    if client.origin.pid != os.getpid():
        # The model uses no memory here; querying llama.cpp for devices would allocate on each.
        return Monitor(client, interval=interval)
    from llmkit.runtime import assembly

    def gpus() -> list[GpuMemory]:
        return [
            GpuMemory(gpu.name, gpu.total_bytes - gpu.free_bytes, gpu.total_bytes)
            for gpu in assembly.gpus()
        ]

    return Monitor(client, interval=interval, gpus=gpus)
