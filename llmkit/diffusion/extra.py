"""The package of the extra ``images``, which is imported late, and may be missing."""

from __future__ import annotations

import importlib.util

from llmkit.errors import ModelLoadError

__all__ = ["INSTALL", "check_installed", "is_installed"]

INSTALL = 'pip install "llmkit[images]"'
PACKAGE = "stable_diffusion_cpp"


def is_installed() -> bool:
    """Whether the package is here; imports nothing."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed() -> None:
    """Raises `ModelLoadError`, which says what to install."""
    if not is_installed():
        raise ModelLoadError(
            "drawing needs stable-diffusion-cpp-python, which is not installed; install it with\n"
            f"    {INSTALL}"
        )
