"""`make bench`: our engine, our gateway alone and in Jupyter, and llama-server from the same sources, in turns within one run.

All arms have the same model, threads and context per sequence; prompts are unique, so no arm meets a warm cache. The order turns with each repetition.
The machine's own noise is watched: the CPU share of others before each run is reported, and should be near zero. The figures are medians; ratios are
to llama-server at the better of its two KV layouts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "notebooks")]

import demo  # noqa: E402
import peer  # noqa: E402

FIGURES = ("tok_s", "ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms", "itl_max_ms")
N_CTX, N_SLOTS = 512, 32


class Arm:
    """Something under load. ``measure`` runs one job and gives its figures."""

    def __init__(self, label: str) -> None:
        self.label = label

    def measure(self, job: dict[str, int]) -> dict[str, Any]:
        raise AssertionError

    def close(self) -> None: ...


class EngineArm(Arm):
    def __init__(self, label: str, model: str, threads: int, **options: Any) -> None:
        super().__init__(label)
        settings = json.dumps({"model": model, "n_ctx": N_CTX, "n_slots": N_SLOTS, "threads": threads, **options})
        command = [sys.executable, str(ROOT / "benchmarks" / "engine_arm.py"), settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def measure(self, job: dict[str, int]) -> dict[str, Any]:
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

    def measure(self, job: dict[str, int]) -> dict[str, Any]:
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


def gateway_arm(model: str, threads: int) -> ServerArm:
    port = free_port()
    command = [sys.executable, "-m", "llmkit", "serve", model, "--port", str(port), "--n-ctx", str(N_CTX), "--n-slots", str(N_SLOTS), "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ServerArm("llmkit gateway", f"http://127.0.0.1:{port}/v1", "none", process)


def llama_arm(model: str, threads: int, layout: str) -> ServerArm:
    port, binary = free_port(), peer.llama_server()
    command = [str(binary), "--host", "127.0.0.1", "--port", str(port), "-m", model, "-c", str(N_CTX * N_SLOTS), "-np", str(N_SLOTS), layout]
    command += ["-t", str(threads), "-tb", str(threads), "-fa", "on", "--no-ui"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ServerArm(f"llama-server {layout}", f"http://127.0.0.1:{port}/v1", "none", process)


class JupyterArm(ServerArm):
    """A kernel in a Jupyter server, through the extension."""

    def __init__(self, model: str, threads: int, folder: Path) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient

        server, url, token, runtime = demo.start_server(folder)
        kernel_id = demo.call(url, token, "/api/kernels", {"name": "python3"})["id"]
        self.kernel = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel_id}.json"))
        self.kernel.load_connection_file()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=60)
        demo.evaluate(self.kernel, f"import llmkit; llm = llmkit.load({model!r}, n_ctx={N_CTX}, n_slots={N_SLOTS}, threads={threads})")
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
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--unified", action="store_true", help="also measure our engine with one unified KV buffer")
    parser.add_argument("--no-peer", action="store_true", help="without llama-server")
    parser.add_argument("--out", type=Path, help="append every run as JSON")
    args = parser.parse_args()
    from llmkit.models.registry import resolve

    path = str(resolve(args.model).path)
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as folder:
        arms: list[Arm] = [] if args.no_peer else [llama_arm(path, args.threads, "-kvu"), llama_arm(path, args.threads, "-no-kvu")]
        try:
            arms += [EngineArm("llmkit engine", args.model, args.threads)]
            if args.unified:
                arms += [EngineArm("llmkit engine, unified", args.model, args.threads, kv_unified=True)]
            arms += [gateway_arm(args.model, args.threads), JupyterArm(args.model, args.threads, Path(folder))]
            errors = sum(compare(arms, clients, args) for clients in args.clients)
        finally:
            for arm in arms:
                arm.close()
    return int(errors > 0)


def compare(arms: list[Arm], clients: int, args: argparse.Namespace) -> int:
    """Prints a table; returns how many requests failed."""
    runs: dict[str, list[dict[str, Any]]] = {arm.label: [] for arm in arms}
    noise = []
    for rep in range(args.reps):
        for n, arm in enumerate(arms if rep % 2 == 0 else arms[::-1]):
            noise.append(wait_quiet())
            job = {
                "concurrency": clients,
                "requests": max(3, min(2 * clients, 32)),
                "prompt_words": 256,
                "max_tokens": 128,
                "seed": 1000 * clients + 10 * rep + n,
            }
            result = arm.measure(job)
            runs[arm.label].append(result)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps({"arm": arm.label, **job, **result}) + "\n")
    medians = {label: {f: statistics.median(r[f] for r in results) for f in FIGURES} for label, results in runs.items()}
    peers = [m for label, m in medians.items() if label.startswith("llama-server")]
    best = max(peers, key=lambda m: m["tok_s"]) if peers else None
    print(f"\n{clients} clients, 256-token prompts, 128 out, median of {args.reps} (idle load of others: {max(noise):.0%} at most)")
    print("| arm | tok/s | ratio | TTFT p50 / p95 ms | ITL p50 / p95 / max ms |\n|---|---|---|---|---|")
    for label, m in medians.items():
        ratio = f"{m['tok_s'] / best['tok_s']:.2f}" if best else "–"
        itl = f"{m['itl_p50_ms']:.1f} / {m['itl_p95_ms']:.1f} / {m['itl_max_ms']:.0f}"
        print(f"| {label} | {m['tok_s']:.1f} | {ratio} | {m['ttft_p50_ms']:.0f} / {m['ttft_p95_ms']:.0f} | {itl} |", flush=True)
    shares = [r["python_share"] for r in runs.get("llmkit engine", [])]
    if shares:
        print(f"Python's share of an engine step: {statistics.median(shares):.2%}")
    errors = sum(r["errors"] for results in runs.values() for r in results)
    if errors:
        print(f"ERRORS: {errors} requests failed; the figures do not count", flush=True)
    return errors


if __name__ == "__main__":
    sys.exit(main())
