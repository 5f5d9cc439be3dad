"""Images built by buildah and run by podman, in a store of their own, without a daemon and without
a registry: Debian's root and the wheels are those of `.ci/clients`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from deploy_tools import run, tool

PARTS = Path(sys.prefix) / "clients" / "image"
BASE = "localhost/debian"
# Here runc may raise no limits, which podman would ask of it by itself.
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]


class Store:
    """Images and containers in one folder, which leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        """Skips loudly without the programs, root or the parts, but never in CI."""
        for lacking, why in (
            (os.geteuid() != 0, "only root can build images here"),
            (not (PARTS / "rootfs.tar").exists(), f"{PARTS} is missing: bash .ci/clients"),
        ):
            if lacking:
                if os.environ.get("CI"):
                    pytest.fail(f"{why}, and CI may not skip")
                pytest.skip(why)
        self.folder = folder
        # podman takes at most 50 characters for it.
        self._run = tempfile.TemporaryDirectory(prefix="pod-", ignore_cleanup_errors=True)
        places = ["--root", str(folder / "store"), "--runroot", self._run.name]
        self._buildah = [tool("buildah", "buildah"), *places]
        self._podman = [
            tool("podman", "podman"), *places, "--runtime", tool("runc", "runc"),
            "--cgroup-manager", "cgroupfs", "--events-backend", "file",
            "--tmpdir", str(folder / "tmp"),
        ]  # fmt: skip
        # A store of layers if this file system can, else of whole copies.
        for driver in ("overlay", "vfs"):
            with contextlib.suppress(AssertionError):
                self.buildah("--storage-driver", driver, "rm", "--all")
                break
        for command in (self._buildah, self._podman):
            command += ["--storage-driver", driver]
        made = self.buildah("from", "scratch").split()[-1]
        self.buildah("add", "--quiet", made, PARTS / "rootfs.tar", "/")
        self.buildah("commit", "--quiet", "--rm", made, BASE)

    def buildah(self, *arguments: str | Path) -> str:
        return run(*self._buildah, *arguments, timeout=560, cwd=ROOT)

    def podman(self, *arguments: str | Path, timeout: float = 90) -> str:
        """What it prints on standard output; it must succeed."""
        done = self.tried(*arguments, timeout=timeout)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done.stdout

    def tried(
        self, *arguments: str | Path, timeout: float = 90
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._podman, *map(str, arguments)], capture_output=True, text=True, timeout=timeout
        )

    def build(self, dockerfile: str, name: str, **arguments: str) -> None:
        """As `docker build` does; pip finds wheels instead of an index, and what was compiled."""
        settings = self.folder / "pip.conf"
        settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        given = {"BASE_IMAGE": BASE, **arguments}
        self.buildah(
            "bud", "--isolation", "chroot", "--format", "docker", "--quiet",
            "-f", f"deploy/docker/{dockerfile}", "-t", f"localhost/{name}",
            "-v", f"{PARTS / 'wheels'}:/wheels:ro", "-v", f"{settings}:/etc/pip.conf:ro",
            *(word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")),
            ".",
        )  # fmt: skip

    @contextlib.contextmanager
    def running(self, image: str, *command: str, options: list[str]) -> Iterator[Container]:
        name = self.podman(
            "run",
            "--detach",
            "--network",
            "host",
            *LIMITS,
            *options,
            f"localhost/{image}",
            *command,
        ).strip()
        try:
            yield Container(self, name)
        finally:
            self.tried("rm", "--force", "--volumes", "--time", "5", name)

    def close(self) -> None:
        self.tried("rm", "--all", "--force", "--volumes", "--time", "1")
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith((str(self.folder), self._run.name)):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._run.cleanup()


class Container:
    """A running container."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    def run(self, *command: str) -> str:
        return self.store.podman("exec", self.name, *command)

    def state(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.store.podman("inspect", self.name))
        state: dict[str, Any] = found[0]["State"]
        return state

    def logs(self) -> str:
        done = self.store.tried("logs", self.name)
        return done.stdout + done.stderr

    def is_healthy(self) -> bool:
        """By the image's own check, which no systemd runs here."""
        return self.store.tried("healthcheck", "run", self.name).returncode == 0

    def until_healthy(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.is_healthy():
            state = self.state()
            assert state["Running"] and time.monotonic() < end, (state, self.logs()[-3000:])
            time.sleep(0.2)

    def stop(self, seconds: int) -> int:
        """SIGTERM, and SIGKILL after so long. Returns the exit status."""
        self.store.podman("stop", "--time", str(seconds), self.name, timeout=seconds + 30)
        return int(self.state()["ExitCode"])
