"""Settings files for the tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.hub import HUB_OPTIONS
from llmkit.settings.options import OPTIONS
from llmkit.settings.quotas import QUOTA_OPTIONS
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import ServeSettings, read_settings

ALL_ROWS = [
    *GATEWAY_OPTIONS.values(),
    *HUB_OPTIONS.values(),
    *OPTIONS.values(),
    *SAMPLING_OPTIONS.values(),
    *MODEL_OPTIONS.values(),
    *KEY_OPTIONS.values(),
    *QUOTA_OPTIONS.values(),
]
FULL = """
port = 4000
cors_origins = ["https://a.example"]
n_ctx = 2048

[sampling]
temperature = 0.5

[models.small]
model = "smollm2"
n_slots = 2
aliases = ["tiny"]
pinned = true

[models.small.sampling]
top_k = 5

[keys.ann]
key = "sk-ann"
scopes = ["inference", "admin"]
rate = "60/minute"
expires = 2099-01-31
"""


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "llmkit.toml"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def read(
    text: str, folder: Path, given: dict[str, Any] | None = None, **variables: str
) -> ServeSettings:
    return read_settings(given or {}, write(folder, text), variables)


def uncommented(text: str) -> str:
    """The example as a user has it who wants all of it."""
    return re.sub(r"^# ", "", text, flags=re.MULTILINE)
