"""Warnings from threads that must not die: engine, bridge, loaders. Standard library only."""

from __future__ import annotations

import logging
import warnings

__all__ = ["report"]

logger = logging.getLogger("llmkit")


def report(message: str, category: type[Warning] = RuntimeWarning, stacklevel: int = 2) -> None:
    """Warn; if warnings are errors, log instead: a warning must not end a thread."""
    try:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    except Warning:
        logger.warning("%s", message)
