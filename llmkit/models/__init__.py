"""The models that are loaded here: ``llmkit.models["smollm2"]``, with completion of the names. Below are files and names of models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from llmkit.errors import ModelNotFoundError

__all__ = ["handles", "living"]

handles: dict[str, Any] = {}  # handles by name, the newest last; kept by `llmkit.loading`


def living() -> dict[str, Any]:
    """Those whose model is there: the process of an attached one may have ended."""
    for name in [name for name, llm in handles.items() if llm.closed]:
        handles.pop(name, None)
    return handles


class _Models(ModuleType):
    """The module itself is the mapping that people use."""

    def __getitem__(self, name: str) -> Any:
        try:
            return living()[name]
        except KeyError:
            raise ModelNotFoundError(f"no model {name!r} is loaded here; loaded: {', '.join(handles) or 'none'}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(list(living()))

    def __len__(self) -> int:
        return len(living())

    def __contains__(self, name: object) -> bool:
        return name in living()

    def _ipython_key_completions_(self) -> list[str]:
        return list(living())

    def __repr__(self) -> str:
        return "\n".join(repr(llm) for llm in living().values()) or "no model is loaded here; llmkit.load() loads one"


sys.modules[__name__].__class__ = _Models
