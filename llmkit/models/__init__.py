"""Model files and their names.

For users, ``llmkit.models`` is also the mapping of the models loaded in this process:
``llmkit.models["smollm2"]``, with name completion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

from llmkit.errors import ModelNotFoundError

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
