"""Formulas in Markdown, as MathML: ``$…$``, ``$$…$$``, ``\\(…\\)`` and ``\\[…\\]``. Pure.

A formula that is too long, has no end or cannot be read stays text. Prices are no formulas.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

__all__ = ["mathml", "maths"]

MAX_CHARS = 1500
# They make formulas grow without bound, or say what a page may load and look like.
REFUSED = re.compile(r"\\(?:(?:re)?newcommand|def|let|href|style|class|includegraphics|cssId)\b")
CLOSING = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$"}
PROSE = re.compile(r"\d[^\\^_={}]* ")


def maths(md: MarkdownIt) -> None:
    """A plugin of markdown-it."""
    md.inline.ruler.before("escape", "maths", _inline)
    md.block.ruler.before(
        "fence", "maths_block", _block, {"alt": ["paragraph", "blockquote", "list"]}
    )
    md.add_render_rule("maths", _render)


def mathml(latex: str, *, display: bool) -> str | None:
    """A formula as a ``<math>`` element; None if it cannot be read.

    >>> "<msup><mi>x</mi><mn>2</mn></msup>" in mathml("x^2", display=False)
    True
    """
    if len(latex) > MAX_CHARS or REFUSED.search(latex):
        return None
    try:
        formula = convert_to_element(latex, display="block" if display else "inline")
        for element in formula.iter():
            if element.text:  # holds entities, and what the formula says as it stands
                element.text = html.unescape(element.text)
        formula.set("alttext", latex)
        return ElementTree.tostring(formula, encoding="unicode")
    except Exception:  # it raises whatever a malformed formula leads it to
        return None


def _inline(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    if source[start] not in "$\\":
        return False
    opening = next((o for o in CLOSING if source.startswith(o, start)), None)
    if opening is None:
        return False
    begin, closing = start + len(opening), CLOSING[opening]
    # A bound, or a text of many dollars would take quadratic time.
    end = source.find(closing, begin, min(state.posMax, begin + MAX_CHARS))
    if end < 0 or not source[begin:end].strip():
        return False
    if opening == "$" and not _is_formula(source[begin:end], source[end + 1 : end + 2]):
        return False
    if not silent:
        _fill(state.push("maths", "", 0), source[begin:end], opening)
    state.pos = end + len(closing)
    return True


def _is_formula(content: str, after: str) -> bool:
    """Whether what is between two dollars is no price."""
    if content[0].isspace() or content[-1].isspace() or after.isdigit():
        return False
    return "\n\n" not in content and not PROSE.match(content)


def _block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    if state.is_code_block(first):
        return False
    begin = state.bMarks[first] + state.tShift[first]
    opening = state.src[begin : begin + 2]
    if opening not in ("$$", "\\["):
        return False
    closing = CLOSING[opening]
    if state.src.find(closing, begin + 2, begin + MAX_CHARS) < 0:
        return False  # looked for once, and no further than a formula may reach
    lines: list[str] = []
    for line in range(first, last):
        if state.isEmpty(line) or (line > first and state.sCount[line] < state.blkIndent):
            return False
        start = state.bMarks[line] + state.tShift[line]
        text = state.src[start + 2 * (line == first) : state.eMarks[line]].rstrip()
        if closing in text:
            text, _, rest = text.partition(closing)
            if rest.strip(" .,;"):
                return False  # a paragraph goes on
            if not silent:
                content = "\n".join([*lines, text]) + rest.strip()
                token = state.push("maths", "", 0)
                token.map, token.block = [first, line + 1], True
                _fill(token, content, opening)
            state.line = line + 1
            return True
        lines.append(text)
    return False


def _fill(token: Token, content: str, opening: str) -> None:
    token.content, token.markup = content.strip(), opening


def _render(renderer: object, tokens: Sequence[Token], i: int, *_: object) -> str:
    token = tokens[i]
    display = token.markup in ("$$", "\\[")
    formula = mathml(token.content, display=display)
    if formula is None:
        formula = f"<code>{escapeHtml(token.content)}</code>"
    return f"<p>{formula}</p>\n" if token.block else formula
