"""Memory, for the metrics: of the machine, its GPUs, and each model. Tornado loop only."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llmkit.cluster.pool import ReplicaPool
from llmkit.gateway.directory import Entry
from llmkit.gateway.ops.series import Names
from llmkit.gateway.ops.totals import ModelTotals
from llmkit.protocol.client import EngineClient
from llmkit.system.gpu_memory import GpuMemory
from llmkit.version import __version__

__all__ = ["engine_families", "machine_families", "memory_families", "pids_of", "resident"]

COUNTERS = (
    ("prompt_tokens", "Prompt tokens, cached ones included.", "prompt_tokens_total"),
    ("cached_tokens", "Prompt tokens that came from a cached prefix.", "cached_tokens_total"),
    ("generation_tokens", "Generated tokens.", "generation_tokens_total"),
    ("draft_tokens", "Drafted tokens.", "draft_tokens_total"),
    ("accepted_draft_tokens", "Drafted tokens that were accepted.", "accepted_tokens_total"),
    ("media", "Images and pieces of sound in prompts.", "media_total"),
    ("encoded_media", "Images and pieces of sound that were encoded.", "encoded_total"),
    ("encode_seconds", "Time of encoding images and sound.", "encode_seconds_total"),
    ("engine_requests", "Requests to the engine, of notebooks too.", "requests_total"),
    ("preemptions", "Requests that made way for others.", "preemptions_total"),
    ("engine_steps", "Steps of the engine.", "steps_total"),
    ("engine_step_seconds", "Duration of all steps together.", "step_seconds_total"),
    ("engine_backend_seconds", "Of the steps, time in llama.cpp.", "backend_seconds_total"),
)
GAUGES = (
    ("requests_running", "Requests being computed.", "num_running"),
    ("requests_waiting", "Requests waiting for a slot.", "num_waiting"),
    ("slots", "Requests that can be computed at once.", "num_slots"),
    ("kv_used_tokens", "KV cells of running requests.", "kv_used_tokens"),
    ("kv_cached_tokens", "KV cells that hold prefixes for later.", "kv_cached_tokens"),
    ("kv_capacity_tokens", "KV cells.", "kv_capacity_tokens"),
    ("host_cached_tokens", "Tokens of prefixes parked in RAM.", "host_cached_tokens"),
    ("requests_encoding", "Running requests that wait for an image to be encoded.", "num_encoding"),
    ("encoded_bytes", "Encoded images and sound in RAM.", "encoded_bytes"),
)
LABELS = ("model",)


def engine_families(models: Mapping[str, ModelTotals]) -> Iterator[Metric]:
    """What engines count, under our own names."""
    for name, text, field in COUNTERS:
        counter = CounterMetricFamily(f"llmkit_{name}", text, labels=LABELS)
        for model, totals in models.items():
            counter.add_metric((model,), totals.counted[field])
        yield counter
    for name, text, field in GAUGES:
        gauge = GaugeMetricFamily(f"llmkit_{name}", text, labels=LABELS)
        for model, totals in models.items():
            if totals.is_here:
                gauge.add_metric((model,), totals.now[field])
        yield gauge


def memory_families(entries: Sequence[Entry], names: Names) -> Iterator[Metric]:
    """What each model takes: by llama.cpp's account, and its processes' resident memory."""
    parts: dict[tuple[str, str], int] = defaultdict(int)
    devices: dict[tuple[str, str], int] = defaultdict(int)
    pids: dict[str, set[int]] = defaultdict(set)
    replicas: dict[tuple[str, str], int] = defaultdict(int)
    for entry in entries:
        model = entry.client.description
        name = names(model.name)
        for kind, size in (
            ("weights", model.weights_bytes),
            ("kv", model.kv_bytes),
            ("compute", model.compute_bytes),
        ):
            parts[name, kind] += size
        for device, size in model.gpu_bytes.items():
            devices[name, device[:40]] += size
        pids[name].update(pids_of(entry.client))
        if isinstance(entry.client, ReplicaPool):
            for member in entry.client.members:
                replicas[name, member.client.state.phase] += 1
    memory = GaugeMetricFamily(
        "llmkit_model_memory_bytes",
        "Memory of a model, in RAM and on GPUs.",
        labels=("model", "kind"),
    )
    for key, size in parts.items():
        memory.add_metric(key, size)
    yield memory
    gpu = GaugeMetricFamily(
        "llmkit_model_gpu_bytes", "Memory of a model on each GPU.", labels=("model", "device")
    )
    for key, size in devices.items():
        gpu.add_metric(key, size)
    yield gpu
    family = GaugeMetricFamily(
        "llmkit_model_resident_memory_bytes",
        "Resident memory of the processes that hold a model.",
        labels=LABELS,
    )
    for name, found in pids.items():
        family.add_metric((name,), sum(map(resident, found)))
    yield family
    pooled = GaugeMetricFamily(
        "llmkit_model_replicas", "Replicas of a model, by their state.", labels=("model", "state")
    )
    for key, count in replicas.items():
        pooled.add_metric(key, count)
    yield pooled


def machine_families(gpus: Callable[[], Sequence[GpuMemory]]) -> Iterator[Metric]:
    """The machine's memory, its GPUs', and the version."""
    ram = psutil.virtual_memory()
    memory = GaugeMetricFamily(
        "llmkit_host_memory_bytes", "Memory of this machine.", labels=("kind",)
    )
    memory.add_metric(("total",), ram.total)
    memory.add_metric(("available",), ram.available)
    yield memory
    used, total, busy = (
        GaugeMetricFamily(f"llmkit_gpu_{name}", text, labels=("device", "name"))
        for name, text in (
            ("memory_used_bytes", "Memory in use on a GPU, by all programs."),
            ("memory_total_bytes", "Memory of a GPU."),
            ("busy_ratio", "Share of time that a GPU was busy, 0 to 1."),
        )
    )
    for device in gpus():
        labels = device.device, device.name
        used.add_metric(labels, device.used_bytes)
        total.add_metric(labels, device.total_bytes)
        if device.busy is not None:
            busy.add_metric(labels, device.busy)
    yield from (used, total, busy)
    build = GaugeMetricFamily("llmkit_build_info", "The version of llmkit.", labels=("version",))
    build.add_metric((__version__,), 1)
    yield build


def pids_of(client: EngineClient) -> set[int]:
    """The processes that hold a model here."""
    clients = [m.client for m in client.members] if isinstance(client, ReplicaPool) else [client]
    return {pid for pid in (c.origin.pid for c in clients) if pid}


def resident(pid: int) -> int:
    """Bytes of a process in RAM; 0 if it is gone."""
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0
