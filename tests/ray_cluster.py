"""A real Ray cluster of one node, on loopback, from the environment that `.ci/clients` made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub_server import free_ports

RAY = Path(sys.prefix) / "clients" / "ray" / "bin" / "ray"
LLMKIT = Path(sys.prefix) / "bin" / "llmkit"
START_S = 90.0
# Ray's processes, and what it starts, know nothing of the tests' surroundings.
OWN = ("RAY_", "LLMKIT_", "PYTEST_", "JUPYTER", "PYTHON")
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}


class RayCluster:
    """A head without workers, ended with all that it started by ``stop``."""

    def __init__(self) -> None:
        """Skips loudly without Ray, but never in CI."""
        if not RAY.exists():
            if os.environ.get("CI"):
                pytest.fail(f"{RAY} is missing, and CI may not skip")
            pytest.skip("Ray is missing: bash .ci/clients")
        # Not pytest's folder: Ray's sockets lie in it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        head, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self._seen: set[psutil.Process] = set()
        command = [
            str(RAY), "start", "--head", "--disable-usage-stats", "--port", str(head),
            "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client),
            "--dashboard-agent-listen-port", str(agent), "--num-cpus", "8",
            "--object-store-memory", str(128 << 20), "--temp-dir", str(self.folder),
        ]  # fmt: skip
        try:
            # Not --block: that ends all of them when one of them ends.
            with (self.folder / "head.log").open("wb") as log:
                subprocess.run(
                    command,
                    env={**PLAIN, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(self.folder)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    timeout=START_S,
                    check=True,
                )
            until(self._answers, START_S, self._said)
        except BaseException:
            print(self._said(), file=sys.stderr)
            self.stop()
            raise

    def llmkit(self, *args: str) -> subprocess.CompletedProcess[str]:
        """A `llmkit ray …` for this cluster."""
        command = [str(LLMKIT), "ray", *args, "--address", self.address]
        return subprocess.run(
            command, env={**PLAIN, "HOME": str(self.folder)}, capture_output=True, text=True,
            timeout=START_S,
        )  # fmt: skip

    def details(self) -> dict[str, Any]:
        """What Ray Serve says of itself."""
        found: dict[str, Any] = self._get("/api/serve/applications/")
        return found

    def engines(self) -> dict[int, psutil.Process]:
        """The engines that run, by the process ids of their actors."""
        found = {}
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                if "--report-fd" in process.cmdline():
                    found[process.ppid()] = process
        return found

    def one(self, name: str) -> psutil.Process:
        """The process of Ray's that has this name."""
        return self._named(name)[0]

    @property
    def alive(self) -> bool:
        """Whether its head is."""
        return bool(self._named("gcs_server"))

    def stop(self) -> None:
        processes = self._all()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, 10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _named(self, start: str) -> list[psutil.Process]:
        found = []
        for process in self._all():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if process.name().startswith(start):
                    found.append(process)
        return found

    def _all(self) -> set[psutil.Process]:
        """By their home, which is this folder, and by their parents: actors rename themselves."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.folder):
                    self._seen.add(process)
        for process in [*self._seen]:
            with contextlib.suppress(psutil.Error):
                self._seen.update(process.children(recursive=True))
        self._seen = {process for process in self._seen if process.is_running()}
        return self._seen

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return "applications" in self.details()
        return False

    def _get(self, path: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.address + path, timeout=10) as reply:
            return json.load(reply)

    def _said(self) -> str:
        return (self.folder / "head.log").read_text(errors="replace")[-3000:]


def until(done: Callable[[], Any], seconds: float, told: Callable[[], object] = lambda: "") -> Any:
    """Wait for something; returns it."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {told()}"
        time.sleep(0.1)
    return value
