"""The gateway's pages, rendered by Jinja from the files beside this one, with autoescape on.

Knows how they look, but not where the values come from: no engine, route or request. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit.gateway.web.assets import MODULES, STYLES, folder
from llmkit.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["View", "docs_page", "page", "status_part", "usage_page"]

View = Literal["chat", "status"]


def page(
    view: View,
    home: View,
    *,
    base: str,
    state: dict[str, Any] | None = None,
    locked: bool = False,
    has_usage: bool = False,
    has_login: bool = False,
    proof: str = "",
) -> str:
    """The page with its two tabs, ``view`` in front; ``home`` is the one at the gateway's root.

    ``base`` leads from the page's address to the other routes. ``state`` is what the second tab
    shows before its script has fetched more; a ``locked`` page asks for the key first.
    ``has_usage`` links to what callers have used; with ``has_login`` one logs in elsewhere.
    Its scripts send ``proof`` with each request.
    """
    return _render(
        "page.html",
        view=view,
        chat=f"{base}chat" if home == "status" else base or "./",
        status=(base or "./") + ("" if home == "status" else "#status"),
        base=base,
        assets=base + folder(),
        modules=MODULES,
        styles=STYLES,
        state=state,
        locked=locked,
        has_usage=has_usage,
        has_login=has_login,
        proof=proof,
    )


def status_part(state: dict[str, Any]) -> str:
    """The part of the status page that changes."""
    return _render("status_part.html", state=state)


def usage_page(
    own: dict[str, Any], every: dict[str, Any] | None, *, base: str, has_login: bool
) -> str:
    """What a caller has used, and what everybody has, for those who may see it."""
    return _render(
        "usage.html",
        own=own,
        every=every,
        base=base,
        assets=base + folder(),
        styles=STYLES,
        has_login=has_login,
    )


def docs_page(routes: Sequence[dict[str, Any]]) -> str:
    """The routes by ``tag``, each with its ``method``, ``path``, ``summary`` and ``schema``."""
    return _render("docs.html", routes=routes, version=__version__)


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(values)


@cache
def _environment() -> Environment:
    """Keeps every template it has loaded."""
    # Imported here, so that a gateway's start does not wait for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

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
