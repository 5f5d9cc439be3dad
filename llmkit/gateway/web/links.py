"""Addresses that stand in a text as they are, as links. Pure.

Linkify, which does the same with more rules, takes quadratic time for texts made to that end.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

__all__ = ["bare_links"]

SCHEME = re.compile(r"(?:^|(?<=[^A-Za-z0-9]))https?$")
REST = re.compile(r"://[A-Za-z0-9\[][^\s<>\"'`\\*|]{0,2000}")


def bare_links(md: MarkdownIt) -> None:
    """A plugin of markdown-it."""
    md.inline.ruler.after("text", "bare_links", _rule)


def _rule(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] != ":" or state.linkLevel:
        return False
    scheme = SCHEME.search(state.pending[-6:])
    rest = REST.match(state.src, state.pos, state.posMax)
    if scheme is None or rest is None:
        return False
    tail = rest.group().rstrip(".,;:!?_~")
    while tail.endswith((")", "]")) and tail.count(tail[-1]) > tail.count("(["[tail[-1] == "]"]):
        tail = tail[:-1].rstrip(".,;:!?_~")
    if len(tail) < 4:
        return False
    if not silent:
        name = scheme.group()
        state.pending = state.pending[: -len(name)]
        address = state.md.normalizeLink(name + tail)
        state.push("link_open", "a", 1).attrs = {"href": address}
        state.push("text", "", 0).content = name + tail
        state.push("link_close", "a", -1)
    state.pos += len(tail)
    return True
