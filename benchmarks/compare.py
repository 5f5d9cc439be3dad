"""`make bench`: our engine, our gateway alone and in Jupyter, and llama-server from the same sources, in turns within one run.

All arms have the same model, threads and context per sequence; prompts are unique, so no arm meets a warm cache but for what a workload itself shares.
The order turns with each repetition. The machine's own noise is watched: the CPU share of others before each run is reported, and should be near zero. The
figures are medians; ratios are to llama-server at the better of its two KV layouts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "notebooks")]

import demo  # noqa: E402
import peer  # noqa: E402

ENGINE, GATEWAY = "llmkit engine", "llmkit gateway"
FIGURES = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "itl_max_ms")
LONG_FIGURES = ("long_ttft_ms", "stall_ms", "tok_s_during")
# Tokens of one request and requests at once, for every arm; then the load.
Job = dict[str, Any]
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
CLIENTS = {"unique": [1, 4, 8, 16, 32], "shared-prefix": [8, 16], "long": [4], "copy": [1], "json": [4], "large": [8], "ngram": [1], "defaults": [8]}


class Arm:
    """Something under load. ``measure`` runs one job and gives its figures."""

    def __init__(self, label: str) -> None:
        self.label = label

    def measure(self, job: Job) -> dict[str, Any]:
        raise AssertionError

    def close(self) -> None: ...


class EngineArm(Arm):
    def __init__(self, label: str, model: str, threads: int, n_ctx: int, n_slots: int, root: Path = ROOT, **options: Any) -> None:
        super().__init__(label)
        settings = json.dumps({"model": model, "n_ctx": n_ctx, "n_slots": n_slots, "threads": threads, **options})
        command = [sys.executable, str(root / "benchmarks" / "engine_arm.py"), settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=using(root))
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def measure(self, job: Job) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class ServerArm(Arm):
    """An OpenAI endpoint, loaded by `llmkit bench` in a process of its own."""

    def __init__(self, label: str, base_url: str, key: str, process: subprocess.Popen[Any] | None = None, headers: str = "") -> None:
        super().__init__(label)
        self.base_url, self.key, self.process = base_url, key, process
        for _ in range(600):
            try:
                request = urllib.request.Request(f"{base_url}/models", headers={"Authorization": f"Bearer {key}"})
                with urllib.request.urlopen(request, timeout=5) as reply:
                    if json.load(reply)["data"]:
                        return
            except (OSError, ValueError):
                pass
            time.sleep(0.1)
        raise RuntimeError(f"{label} does not answer at {base_url}")

    def measure(self, job: Job) -> dict[str, Any]:
        command = [sys.executable, "-m", "llmkit", "bench", "--json", "--base-url", self.base_url, "--api-key", self.key]
        for name, value in job.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def using(root: Path) -> dict[str, str]:
    """The environment in which the package at ``root`` is the one imported."""
    return {**os.environ, "PYTHONPATH": str(root)}


def gateway_arm(model: str, *options: str, label: str = GATEWAY, root: Path = ROOT) -> ServerArm:
    port = free_port()
    command = [sys.executable, "-m", "llmkit", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=using(root), cwd=root)
    return ServerArm(label, f"http://127.0.0.1:{port}/v1", "none", process)


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Another commit of this repository, checked out for as long as it is measured."""
    with tempfile.TemporaryDirectory(prefix="llmkit-before-") as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def llama_arm(model: str, label: str, *options: str) -> ServerArm:
    port, binary = free_port(), peer.llama_server()
    command = [str(binary), "--host", "127.0.0.1", "--port", str(port), "-m", model, "--no-ui", *options]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ServerArm(f"llama-server {label}", f"http://127.0.0.1:{port}/v1", "none", process)


class JupyterArm(ServerArm):
    """A kernel in a Jupyter server, through the extension."""

    def __init__(self, model: str, threads: int, n_ctx: int, n_slots: int, folder: Path) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient

        server, url, token, runtime = demo.start_server(folder)
        kernel_id = demo.call(url, token, "/api/kernels", {"name": "python3"})["id"]
        self.kernel = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel_id}.json"))
        self.kernel.load_connection_file()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=60)
        demo.evaluate(self.kernel, f"import llmkit; llm = llmkit.load({model!r}, n_ctx={n_ctx}, n_slots={n_slots}, threads={threads})")
        super().__init__("llmkit in Jupyter", f"{url}/llmkit/v1", token, server)

    def close(self) -> None:
        self.kernel.stop_channels()
        super().close()


def busy_seconds() -> float:
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def wait_quiet() -> float:
    """Wait (30 s at most) until the machine is idle; the share of it that others use."""
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
    parser.add_argument("--clients", type=int, nargs="+", help="requests at a time (those of the workload)")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--unified", action="store_true", help="also measure our engine with one unified KV buffer")
    parser.add_argument("--no-peer", action="store_true", help="without llama-server")
    parser.add_argument("--against", metavar="COMMIT", help="measure our own engine and gateway beside those of this commit, and nothing else")
    parser.add_argument("--out", type=Path, help="append every run as JSON")
    args = parser.parse_args()
    from llmkit.models.registry import resolve

    path = str(resolve(args.model).path)
    names = list(WORKLOADS) if args.workload == "all" else [args.workload]
    return int(sum(run(name, path, args) for name in names) > 0)


def run(workload: str, path: str, args: argparse.Namespace) -> int:
    """All arms under one workload; how many requests failed."""
    n_ctx, n_slots, job = WORKLOADS[workload]
    place = (path, args.threads, n_ctx, n_slots)
    theirs = ["-c", str(n_ctx * n_slots), "-np", str(n_slots), "-t", str(args.threads), "-tb", str(args.threads), "-fa", "on"]
    ours = ["--n-ctx", str(n_ctx), "--n-slots", str(n_slots), "--threads", str(args.threads)]
    layouts = [[layout] for layout in ("-kvu", "-no-kvu")]
    if workload == "ngram":
        layouts = [["-no-kvu", "--spec-type", "ngram-simple"]]
    if workload == "defaults":  # each as its own guide says to start it
        subprocess.run([sys.executable, "-m", "llmkit", "tune", path], check=True)
        theirs, ours, layouts = [], ["--tuned"], [[]]
    if args.against:
        with worktree(args.against) as before:
            ours_now = [EngineArm(ENGINE, *place), gateway_arm(path, *ours)]
            ours_then = [EngineArm(f"before: {ENGINE}", *place, root=before), gateway_arm(path, *ours, label=f"before: {GATEWAY}", root=before)]
            return measure([*ours_then, *ours_now], workload, job, args)
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        arms: list[Arm] = [] if args.no_peer else [llama_arm(path, " ".join(layout) or "defaults", *theirs, *layout) for layout in layouts]
        if workload == "unique":  # the engine alone, and the way through Jupyter, show what the ways out cost
            arms += [EngineArm(ENGINE, *place)]
            if args.unified:
                arms += [EngineArm(f"{ENGINE}, unified", *place, kv_unified=True)]
            arms += [JupyterArm(*place, Path(folder))]
        return measure([*arms, gateway_arm(path, *ours)], workload, job, args)


def measure(arms: list[Arm], workload: str, job: Job, args: argparse.Namespace) -> int:
    """The arms, at each number of clients, then closed; how many requests failed."""
    try:
        return sum(compare(arms, workload, clients, {"workload": workload, **job}, args) for clients in args.clients or CLIENTS[workload])
    finally:
        for arm in arms:
            arm.close()


def compare(arms: list[Arm], name: str, clients: int, load: Job, args: argparse.Namespace) -> int:
    """Prints a table; returns how many requests failed."""
    runs: dict[str, list[dict[str, Any]]] = {arm.label: [] for arm in arms}
    noise = []
    for rep in range(args.reps):
        for n, arm in enumerate(arms if rep % 2 == 0 else arms[::-1]):
            noise.append(wait_quiet())
            job = {"requests": max(3, 2 * clients), **load, "concurrency": clients, "seed": 1000 * clients + 10 * rep + n}
            result = arm.measure(job)
            runs[arm.label].append(result)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps({"arm": arm.label, "case": name, **job, **result}) + "\n")
    figures = FIGURES + (LONG_FIGURES if load["workload"] == "long" else ())
    medians = {label: {f: statistics.median(r[f] or 0.0 for r in results) for f in figures} for label, results in runs.items()}
    peers = [m for label, m in medians.items() if label.startswith("llama-server")]
    best = max(peers, key=lambda m: m["tok_s"]) if peers else None
    print(f"\n{name}: {clients} clients, median of {args.reps} (idle load of others: {max(noise):.0%} at most)")
    print("| arm | tok/s | ratio | TTFT p50 / p95 ms | ITL p50 / p95 / max ms |\n|---|---|---|---|---|")
    for label, m in medians.items():
        if earlier := runs.get(f"before: {label}"):  # the machine's speed wanders: only runs of one repetition are compared
            ratio = f"{statistics.median(a['tok_s'] / b['tok_s'] for a, b in zip(runs[label], earlier, strict=True)):.2f}"
        else:
            ratio = f"{m['tok_s'] / best['tok_s']:.2f}" if best else "–"
        itl = f"{m['itl_p50_ms']:.1f} / {m['itl_p95_ms']:.1f} / {m['itl_max_ms']:.0f}"
        print(f"| {label} | {m['tok_s']:.1f} | {ratio} | {m['ttft_p50_ms']:.0f} / {m['ttft_p95_ms']:.0f} | {itl} |", flush=True)
        if load["workload"] == "long":
            print(f"  the long prompt's TTFT {m['long_ttft_ms']:.0f} ms; meanwhile stalls of {m['stall_ms']:.0f} ms, {m['tok_s_during']:.1f} tok/s")
    shares = [r["python_share"] for r in runs.get(ENGINE, [])]
    if shares:
        print(f"Python's share of an engine step: {statistics.median(shares):.2%}")
    errors = sum(r["errors"] for results in runs.values() for r in results)
    if errors:
        print(f"ERRORS: {errors} requests failed; the figures do not count", flush=True)
    return errors


if __name__ == "__main__":
    sys.exit(main())
