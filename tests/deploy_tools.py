"""The programs that check what is in `deploy/`: Debian's, and those of `.ci/clients`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.prefix) / "clients" / "deploy"


def tool(name: str, package: str = "") -> str:
    """Where a program is; skips loudly without it, but never in CI.

    ``package`` is Debian's; without one it comes from `.ci/clients`.
    """
    places = [str(TOOLS / "bin")] if not package else [os.environ["PATH"], "/usr/sbin", "/sbin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing, and CI may not skip")
        how = f"apt-get install {package}" if package else "bash .ci/clients"
        pytest.skip(f"no {name} here: {how}")
    return found


def run(*command: str | Path, timeout: float = 60, **options: object) -> str:
    """What a program prints, both ways; it must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-6000:]}"
    return done.stdout
