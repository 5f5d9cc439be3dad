"""`llmkit doctor` in tests: run as a command, and its findings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from terminal import LLMKIT

from llmkit.cli.findings import Finding


def only(findings: Iterable[Finding], topic: str = "") -> Finding:
    """The one finding of this topic."""
    (found,) = [f for f in findings if topic in f.topic]
    return found


def levels(findings: Iterable[Finding]) -> list[str]:
    return [f.level for f in findings]


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LLMKIT, "doctor", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
