"""Warnings from threads that must go on: engine, bridge, loaders. Standard library only."""

from __future__ import annotations

import logging
import warnings

__all__ = ["report"]

logger = logging.getLogger("llmkit")


def report(message: str, category: type[Warning] = RuntimeWarning, stacklevel: int = 2) -> None:
    """Warn; where warnings are errors, log instead: a thread that serves others must not end because something was worth a word."""
    try:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    except Warning:
        logger.warning("%s", message)
