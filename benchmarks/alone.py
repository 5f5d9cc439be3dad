"""`make measure`: measurements without a peer, as ratios within one run.

monitor    tokens/s of four streams with a live monitor in a real kernel, relative to without one
busy       tokens/s of four streams while the main thread runs pure Python, relative to the best
           fixed thread count; in the process and isolated
follow-up  tokens computed for the next turn of a long conversation, and the time to first token
           after a restart with ``prefix_dir``, relative to a cold start
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap

MONITOR = """
import statistics, time, llmkit
llm = llmkit.load({model!r}, n_ctx=2048, n_slots=4)

def rate(watched):
    monitor = llm.monitor() if watched else None
    if watched:
        display(monitor)
    options = dict(max_tokens=2000, ignore_eos=True, temperature=0, speculate=False)
    streams = [llm.stream("Once upon a time", **options) for _ in range(4)]
    time.sleep(0.5)
    before, began = llm.stats.generation_tokens_total, time.perf_counter()
    time.sleep({seconds})
    speed = (llm.stats.generation_tokens_total - before) / (time.perf_counter() - began)
    assert not any(stream.finished for stream in streams), "too fast: raise max_tokens"
    for stream in streams:
        stream.close()
    if watched:
        monitor.stop()
    time.sleep(0.3)
    return speed

rate(False)
pairs = [
    (rate(False), rate(True)) if i % 2 else (rate(True), rate(False))[::-1] for i in range({reps})
]
median = statistics.median
print(median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs))
"""
BUSY = """
import sys, time, llmkit
llm = llmkit.load({model!r}, n_ctx=1024, n_slots=4, threads={threads}, isolated={isolated})

def rate(busy):
    options = dict(max_tokens=1000, ignore_eos=True, temperature=0, speculate=False)
    streams = [llm.stream("Once upon a time", **options) for _ in range(4)]
    time.sleep(1.5)
    before, began = llm.stats.generation_tokens_total, time.perf_counter()
    count = 0
    while time.perf_counter() - began < {seconds}:
        if busy:
            count += 1
        else:
            time.sleep(0.01)
    speed = (llm.stats.generation_tokens_total - before) / (time.perf_counter() - began)
    assert not any(stream.finished for stream in streams), "too fast: raise max_tokens"
    for stream in streams:
        stream.close()
    return speed

print(rate(False), rate(True))
llm.unload()
"""
FOLLOW_UP = """
import sys, llmkit
history = "The lighthouse keeper wrote down the weather of each day, and who came by. " * 240
with llmkit.load({model!r}, n_ctx=8192, n_slots=2, prefix_dir={folder!r}) as llm:
    first = llm.generate(history + "On Monday", max_tokens=8, temperature=0, ignore_eos=True)
    if {save}:
        llm.save_prefix(history)
    follow_up = history + "On Monday" + first.text + " Then, on Tuesday,"
    usage = llm.generate(follow_up, max_tokens=8, temperature=0).usage
    print(first.metrics.ttft_s, usage.prompt_tokens - usage.cached_tokens, usage.prompt_tokens)
"""


def python(code: str) -> list[float]:
    """The numbers on the last line that a script prints, run in its own process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def kernel(code: str) -> list[float]:
    """The same, run in a real kernel."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    printed: list[str] = []
    try:

        def hear(message: dict[str, object]) -> None:
            content = message["content"]
            assert isinstance(content, dict)
            if message["msg_type"] in ("stream", "error"):
                printed.append(str(content.get("text") or content.get("evalue")))

        client.execute_interactive(code, output_hook=hear, timeout=600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return [float(word) for word in "".join(printed).splitlines()[-1].split()]


def measure_monitor(model: str, reps: int) -> None:
    without, watched, ratio = kernel(MONITOR.format(model=model, seconds=3, reps=max(reps, 8)))
    print(
        f"monitor: {without:.1f} tokens/s without, {watched:.1f} with; "
        f"ratio {ratio:.3f} (median of {max(reps, 8)} pairs)",
        flush=True,
    )


def measure_busy(model: str, reps: int) -> None:
    counts = [None, *range(1, (os.cpu_count() or 1) + 1)]
    for isolated in (False, True):
        runs = {
            n: [
                python(BUSY.format(model=model, threads=n, isolated=isolated, seconds=4))
                for _ in range(reps)
            ]
            for n in counts
        }
        speeds = {
            n: (
                statistics.median(idle for idle, _ in pairs),
                statistics.median(busy for _, busy in pairs),
            )
            for n, pairs in runs.items()
        }
        best = max(busy for n, (_, busy) in speeds.items() if n is not None)
        fixed = ", ".join(
            f"{n} threads {busy:.0f}" for n, (_, busy) in speeds.items() if n is not None
        )
        where = "isolated" if isolated else "in the process"
        idle, busy = speeds[None]
        print(
            f"busy, {where}: {busy:.0f} tokens/s of {idle:.0f} idle; "
            f"fixed: {fixed}; ratio {busy / best:.2f}",
            flush=True,
        )


def measure_follow_up(model: str, reps: int) -> None:
    del reps
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        cold, computed, whole = python(FOLLOW_UP.format(model=model, folder=folder, save=True))
        warm, _, _ = python(FOLLOW_UP.format(model=model, folder=folder, save=False))
    print(
        f"follow-up: {computed:.0f} of {whole:.0f} tokens computed; "
        f"first token cold {cold:.2f} s, after a restart {warm:.2f} s (1/{cold / warm:.0f})",
        flush=True,
    )


MEASURES = {"monitor": measure_monitor, "busy": measure_busy, "follow-up": measure_follow_up}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="*", choices=[*MEASURES, []], help="measurements to run (default: all)"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reps", type=int, default=3)
    args = parser.parse_args()
    for name in args.what or MEASURES:
        MEASURES[name](args.model, args.reps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
