"""`make bench`: our engine, our gateway (alone, in Jupyter) and llama-server from the same sources.

All arms alternate within one run and have the same model, threads and context per sequence. Prompts
are unique, so caches help only where the workload itself shares a prefix. The order reverses with
each repetition. The CPU share of other processes before each run is reported and should be near
zero. Figures are medians; ratios are to llama-server with the better of its two KV layouts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import ENGINE, GATEWAY, ROOT, Arm, EngineArm, Job, JupyterArm, gateway_arm, llama_arm

FIGURES = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "itl_max_ms")
LONG_FIGURES = ("long_ttft_ms", "stall_ms", "tok_s_during")
# n_ctx and n_slots of every arm, then the load.
WORKLOADS: dict[str, tuple[int, int, Job]] = {
    "unique": (512, 32, {"prompt_words": 256, "max_tokens": 128}),
    "shared-prefix": (2048, 16, {"prompt_words": 32, "max_tokens": 32, "requests": 32}),
    "long": (4096, 5, {"prompt_words": 256, "max_tokens": 256, "requests": 4}),
    "copy": (1024, 8, {"prompt_words": 220, "max_tokens": 200, "requests": 4}),
    "json": (1024, 8, {"prompt_words": 256, "max_tokens": 200, "requests": 8}),
    "large": (8192, 8, {"workload": "unique", "prompt_words": 256, "max_tokens": 64}),
    "ngram": (1024, 8, {"workload": "copy", "prompt_words": 220, "max_tokens": 200, "requests": 4}),
    "defaults": (0, 0, {"workload": "unique", "prompt_words": 256, "max_tokens": 128}),
}
CLIENTS = {
    "unique": [1, 4, 8, 16, 32],
    "shared-prefix": [8, 16],
    "long": [4],
    "copy": [1],
    "json": [4],
    "large": [8],
    "ngram": [1],
    "defaults": [8],
}


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Another commit of this repository, checked out while it is measured."""
    with tempfile.TemporaryDirectory(prefix="llmkit-before-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def busy_seconds() -> float:
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def wait_quiet() -> float:
    """Wait (30 s at most) until the machine is idle; returns the CPU share of others."""
    for _ in range(60):
        before = busy_seconds()
        time.sleep(0.5)
        share = (busy_seconds() - before) / 0.5 / (os.cpu_count() or 1)
        if share < 0.1:
            break
    return share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="unique")
    parser.add_argument(
        "--clients", type=int, nargs="+", help="concurrent requests (default: the workload's)"
    )
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--unified", action="store_true", help="also measure our engine with one unified KV buffer"
    )
    parser.add_argument("--no-peer", action="store_true", help="without llama-server")
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help="measure only our engine and gateway, next to those of this commit",
    )
    parser.add_argument("--out", type=Path, help="append every run as JSON")
    args = parser.parse_args()
    from llmkit.models.registry import resolve

    path = str(resolve(args.model).path)
    names = list(WORKLOADS) if args.workload == "all" else [args.workload]
    return int(sum(run(name, path, args) for name in names) > 0)


def run(workload: str, path: str, args: argparse.Namespace) -> int:
    """Run all arms under one workload; the number of failed requests."""
    n_ctx, n_slots, job = WORKLOADS[workload]
    place = (path, args.threads, n_ctx, n_slots)
    theirs = [
        "-c",
        str(n_ctx * n_slots),
        "-np",
        str(n_slots),
        "-t",
        str(args.threads),
        "-tb",
        str(args.threads),
        "-fa",
        "on",
    ]
    ours = ["--n-ctx", str(n_ctx), "--n-slots", str(n_slots), "--threads", str(args.threads)]
    layouts = [[layout] for layout in ("-kvu", "-no-kvu")]
    if workload == "ngram":
        layouts = [["-no-kvu", "--spec-type", "ngram-simple"]]
    if workload == "defaults":  # each started as its own guide recommends
        subprocess.run([sys.executable, "-m", "llmkit", "tune", path], check=True)
        theirs, ours, layouts = [], ["--tuned"], [[]]
    arms: list[Arm] = []
    with contextlib.ExitStack() as running:

        def start(arm: Arm) -> None:
            running.callback(arm.close)
            arms.append(arm)

        if args.against:
            before = running.enter_context(worktree(args.against))
            start(EngineArm(f"before: {ENGINE}", *place, root=before))
            start(gateway_arm(path, *ours, label=f"before: {GATEWAY}", root=before))
            start(EngineArm(ENGINE, *place))
        else:
            for layout in [] if args.no_peer else layouts:
                start(llama_arm(path, " ".join(layout) or "defaults", *theirs, *layout))
            if workload == "unique":  # the engine alone and in Jupyter: what the HTTP paths cost
                start(EngineArm(ENGINE, *place))
                if args.unified:
                    start(EngineArm(f"{ENGINE}, unified", *place, kv_unified=True))
                folder = running.enter_context(tempfile.TemporaryDirectory(prefix="llmkit-bench-"))
                start(JupyterArm(*place, Path(folder)))
        start(gateway_arm(path, *ours))
        return sum(
            compare(arms, workload, clients, {"workload": workload, **job}, args)
            for clients in args.clients or CLIENTS[workload]
        )


def compare(arms: list[Arm], name: str, clients: int, load: Job, args: argparse.Namespace) -> int:
    """Print a table; the number of failed requests."""
    runs: dict[str, list[dict[str, Any]]] = {arm.label: [] for arm in arms}
    noise = []
    for rep in range(args.reps):
        for n, arm in enumerate(arms if rep % 2 == 0 else arms[::-1]):
            noise.append(wait_quiet())
            job = {
                "requests": max(3, 2 * clients),
                **load,
                "concurrency": clients,
                "seed": 1000 * clients + 10 * rep + n,
            }
            result = arm.measure(job)
            runs[arm.label].append(result)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps({"arm": arm.label, "case": name, **job, **result}) + "\n")
    figures = FIGURES + (LONG_FIGURES if load["workload"] == "long" else ())
    medians = {
        label: {f: statistics.median(r[f] or 0.0 for r in results) for f in figures}
        for label, results in runs.items()
    }
    peers = [m for label, m in medians.items() if label.startswith("llama-server")]
    best = max(peers, key=lambda m: m["tok_s"]) if peers else None
    print(
        f"\n{name}: {clients} clients, median of {args.reps} "
        f"(CPU share of other processes: at most {max(noise):.0%})"
    )
    print(
        "| arm | tok/s | ratio | TTFT p50 / p95 ms | ITL p50 / p95 / max ms |\n"
        "|---|---|---|---|---|"
    )
    for label, m in medians.items():
        if earlier := runs.get(f"before: {label}"):
            # The machine's speed drifts: only runs of the same repetition are compared.
            pairs = zip(runs[label], earlier, strict=True)
            ratio = f"{statistics.median(a['tok_s'] / b['tok_s'] for a, b in pairs):.2f}"
        else:
            ratio = f"{m['tok_s'] / best['tok_s']:.2f}" if best else "–"
        itl = f"{m['itl_p50_ms']:.1f} / {m['itl_p95_ms']:.1f} / {m['itl_max_ms']:.0f}"
        print(
            f"| {label} | {m['tok_s']:.1f} | {ratio} "
            f"| {m['ttft_p50_ms']:.0f} / {m['ttft_p95_ms']:.0f} | {itl} |",
            flush=True,
        )
        if load["workload"] == "long":
            print(
                f"  long prompt: TTFT {m['long_ttft_ms']:.0f} ms; other streams meanwhile: "
                f"longest stall {m['stall_ms']:.0f} ms, {m['tok_s_during']:.1f} tok/s"
            )
    shares = [r["python_share"] for r in runs.get(ENGINE, [])]
    if shares:
        print(f"Python's share of an engine step: {statistics.median(shares):.2%}")
    errors = sum(r["errors"] for results in runs.values() for r in results)
    if errors:
        print(f"ERRORS: {errors} requests failed; the figures are invalid", flush=True)
    return errors


if __name__ == "__main__":
    sys.exit(main())
