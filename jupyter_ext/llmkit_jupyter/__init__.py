"""Mounts llmkit's gateway in the Jupyter server, at ``<base_url>llmkit/v1``."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from llmkit_jupyter.extension import LLMKitExtension

    return [{"module": "llmkit_jupyter", "app": LLMKitExtension}]
