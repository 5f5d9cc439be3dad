"""The units of `deploy/systemd` beside llmkit.service."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from deploy_tools import DEPLOY, run, tool

UNITS = DEPLOY / "systemd"


def settings(path: Path) -> dict[str, list[str]]:
    """What a unit sets, a list for each key, since some stand there more than once."""
    found: dict[str, list[str]] = {}
    for line in map(str.strip, path.read_text().splitlines()):
        if "=" in line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "instance"),
    [("llmkit-engine@.service", "llmkit-engine@small.service"), ("llmkit-hub.service", "")],
)
def test_systemd_accepts_the_unit(name: str, instance: str, tmp_path: Path) -> None:
    text = (UNITS / name).read_text().replace("/opt/llmkit/bin/llmkit", sys.executable)
    unit = tmp_path / (instance or name)
    unit.write_text(text)
    extra = tmp_path / f"{unit.name}.d"
    extra.mkdir()
    shutil.copy(UNITS / "gpu.conf", extra)
    assert run(tool("systemd-analyze", "systemd"), "verify", unit) == ""


def test_units_share_their_sandbox_and_have_time_to_drain() -> None:
    first = settings(UNITS / "llmkit.service")
    own = re.compile(
        r"Exec|Environment|Directory|Description|Type|Notify|Watchdog|OOM|Load|Timeout"
    )
    for name in ("llmkit-engine@.service", "llmkit-hub.service"):
        unit = settings(UNITS / name)
        assert {k: v for k, v in unit.items() if not own.search(k)} == {
            k: v for k, v in first.items() if not own.search(k)
        }
        (command,), (stop,) = unit["ExecStart"], unit["TimeoutStopSec"]
        drain = re.search(r"--drain-s=(\d+)", command)
        assert int(stop) > (int(drain[1]) if drain else 30)
