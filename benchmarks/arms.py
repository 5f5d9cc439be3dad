"""The arms of a comparison: our engine, our gateway alone and in Jupyter, and llama-server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import demo  # noqa: E402
import peer  # noqa: E402

__all__ = [
    "ENGINE",
    "GATEWAY",
    "ROOT",
    "Arm",
    "EngineArm",
    "Job",
    "JupyterArm",
    "gateway_arm",
    "llama_arm",
]

ENGINE, GATEWAY = "llmkit engine", "llmkit gateway"
Job = dict[str, Any]  # the keywords of one load run


class Arm:
    """A system under load. ``measure`` runs one job and returns its figures."""

    def __init__(self, label: str) -> None:
        self.label = label

    def measure(self, job: Job) -> dict[str, Any]:
        raise AssertionError

    def close(self) -> None: ...


class EngineArm(Arm):
    """The engine alone, in a process of its own (``engine_arm.py`` of the tree at ``root``)."""

    def __init__(
        self,
        label: str,
        model: str,
        threads: int,
        n_ctx: int,
        n_slots: int,
        root: Path = ROOT,
        **options: Any,
    ) -> None:
        super().__init__(label)
        settings = json.dumps(
            {"model": model, "n_ctx": n_ctx, "n_slots": n_slots, "threads": threads, **options}
        )
        command = [sys.executable, str(root / "benchmarks" / "engine_arm.py"), settings]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=using(root)
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.process.kill()
            raise RuntimeError(f"{label} did not start")

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
    """An OpenAI endpoint, put under load by `llmkit bench` in a process of its own."""

    def __init__(
        self,
        label: str,
        base_url: str,
        key: str,
        process: subprocess.Popen[Any] | None = None,
        headers: str = "",
    ) -> None:
        super().__init__(label)
        self.base_url, self.key, self.process = base_url, key, process
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        request = urllib.request.Request(
            f"{self.base_url}/models", headers={"Authorization": f"Bearer {self.key}"}
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=5) as reply:
                    if json.load(reply)["data"]:
                        return
            except (OSError, ValueError):
                pass
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"{self.label} does not answer at {self.base_url}")

    def measure(self, job: Job) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "llmkit",
            "bench",
            "--json",
            "--base-url",
            self.base_url,
            "--api-key",
            self.key,
        ]
        for name, value in job.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return dict(
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        )

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def using(root: Path) -> dict[str, str]:
    """An environment that imports llmkit from ``root``."""
    return {**os.environ, "PYTHONPATH": str(root)}


def gateway_arm(model: str, *options: str, label: str = GATEWAY, root: Path = ROOT) -> ServerArm:
    port = free_port()
    command = [sys.executable, "-m", "llmkit", "serve", model, "--port", str(port), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=using(root), cwd=root
    )
    return ServerArm(label, f"http://127.0.0.1:{port}/v1", "none", process)


def llama_arm(model: str, label: str, *options: str) -> ServerArm:
    port, binary = free_port(), peer.llama_server()
    command = [
        str(binary),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-m",
        model,
        "--no-ui",
        *options,
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return ServerArm(f"llama-server {label}", f"http://127.0.0.1:{port}/v1", "none", process)


class JupyterArm(ServerArm):
    """A kernel in a Jupyter server, reached through the extension."""

    def __init__(self, model: str, threads: int, n_ctx: int, n_slots: int, folder: Path) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient

        server, url, token, runtime = demo.start_server(folder)
        with contextlib.ExitStack() as failed:
            failed.callback(server.terminate)
            kernel_id = demo.call(url, token, "/api/kernels", {"name": "python3"})["id"]
            self.kernel = BlockingKernelClient(
                connection_file=str(runtime / f"kernel-{kernel_id}.json")
            )
            self.kernel.load_connection_file()
            self.kernel.start_channels()
            self.kernel.wait_for_ready(timeout=60)
            demo.evaluate(
                self.kernel,
                f"import llmkit; llm = llmkit.load({model!r}, n_ctx={n_ctx}, n_slots={n_slots}, "
                f"threads={threads})",
            )
            failed.pop_all()
        super().__init__("llmkit in Jupyter", f"{url}/llmkit/v1", token, server)

    def close(self) -> None:
        self.kernel.stop_channels()
        super().close()
