"""Model files and their names.

For users, ``llmkit.models`` is also the mapping of the models loaded in this process:
``llmkit.models["smollm2"]``, with name completion. Called, ``llmkit.models()``, it is the table of
those on disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.errors import ModelNotFoundError

if TYPE_CHECKING:
    from llmkit.models.library import Listing

__all__ = ["show"]


class Table(Protocol):
    """What the mapping shows: model handles by name."""

    def living(self) -> Mapping[str, Any]: ...


_tables: list[Table] = []


def show(table: Table) -> None:
    """Show this table as ``llmkit.models``."""
    _tables[:] = [table]


class _Models(ModuleType):
    """The module itself is the mapping."""

    @staticmethod
    def _living() -> Mapping[str, Any]:
        return _tables[0].living() if _tables else {}

    def __call__(self, models_dir: str | Path | None = None) -> Listing:
        """The models on this machine: in a folder ($LLMKIT_MODELS_DIR), in Hugging Face's cache
        and in packages. A broken file is listed with what is wrong with it."""
        from llmkit.models.library import Library

        return Library(models_dir or os.environ.get("LLMKIT_MODELS_DIR") or None).models()

    def __getitem__(self, name: str) -> Any:
        try:
            return self._living()[name]
        except KeyError:
            known = ", ".join(self._living()) or "none"
            raise ModelNotFoundError(
                f"no model {name!r} is loaded here; loaded: {known}."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._living()))

    def __len__(self) -> int:
        return len(self._living())

    def __contains__(self, name: object) -> bool:
        return name in self._living()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._living())

    def __repr__(self) -> str:
        handles = self._living().values()
        return (
            "\n".join(repr(llm) for llm in handles)
            or "no model is loaded here; llmkit.load() loads one"
        )


sys.modules[__name__].__class__ = _Models
