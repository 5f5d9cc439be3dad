"""The gateway's pages, rendered by Jinja from the files beside this one, with autoescape on.

Knows how they look, but not where the values come from: no engine, route or request. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmkit.version import __version__

__all__ = ["docs_page", "status_page", "status_part"]


def status_page(state: dict[str, Any] | None, *, base: str, nonce: str) -> str:
    """The status page; with ``state`` None, one that asks for the key and then fetches the state.

    ``base`` leads from the page's address to the other routes; ``nonce`` lets its script run.
    """
    return _render("status.html", state=state, base=base, nonce=nonce)


def status_part(state: dict[str, Any]) -> str:
    """The part of the status page that changes."""
    return _render("status_part.html", state=state)


def docs_page(routes: Sequence[dict[str, Any]]) -> str:
    """The routes by ``tag``, each with its ``method``, ``path``, ``summary`` and ``schema``."""
    return _render("docs.html", routes=routes, version=__version__)


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(values)


@cache
def _environment() -> Environment:
    """Keeps every template it has loaded."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"thousands": "{:,}".format, "percent": "{:.0%}".format, "size": _size}
    return environment


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
