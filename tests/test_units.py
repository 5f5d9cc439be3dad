"""The units of `deploy/systemd` beside llmkit.service."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from deploy_tools import DEPLOY, run, tool

UNITS = DEPLOY / "systemd"


def settings(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "#[")


@pytest.mark.parametrize(
    ("name", "instance"),
    [("llmkit-engine@.service", "llmkit-engine@small.service")],
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
    for name in ("llmkit-engine@.service",):
        unit = settings(UNITS / name)
        assert {k: v for k, v in unit.items() if not own.search(k)} == {
            k: v for k, v in first.items() if not own.search(k)
        }
        drain = re.search(r"--drain-s=(\d+)", unit["ExecStart"])
        assert int(unit["TimeoutStopSec"]) > (int(drain[1]) if drain else 30)
