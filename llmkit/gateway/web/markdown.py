"""What a model writes, as HTML that runs nothing and loads nothing. Pure; any thread.

Markdown becomes blocks: paragraphs, lists, tables, code with the classes of Pygments, formulas in
MathML. HTML in it stays text, pictures become text, links lead to http and https only.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

from llmkit.gateway.web.code import CLASSES, highlighted
from llmkit.gateway.web.links import bare_links
from llmkit.gateway.web.maths import maths

__all__ = ["Growing", "render"]

MAX_CHARS = 1_000_000  # of a text; the rest is not shown
# Cells that rows leave out and the parser adds: by default so many that 2 KB take a second.
TABLES: Any = import_module("markdown_it.rules_block.table")
TABLES.MAX_AUTOCOMPLETED_CELLS = 2000
SMALL, SHARE = 1000, 12  # an open block over SMALL characters waits until it has grown by 1/SHARE
MATHML = {
    *("math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded"),
    *("mphantom", "mprescripts", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub"),
    *("msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover"),
}
HTML = {
    *("a", "blockquote", "br", "code", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol"),
    *("p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
MATHML_ATTRIBUTES = {
    "math": {"display", "alttext"},
    "mo": {"stretchy", "fence", "form", "largeop", "lspace", "rspace", "movablelimits"},
    "mi": {"mathvariant"},
    "mtable": {"columnalign", "rowspacing", "columnspacing", "columnlines", "rowlines"},
    "mtd": {"columnalign"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "mfrac": {"linethickness"},
    "mspace": {"width", "linebreak"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "menclose": {"notation"},
}
HTML_ATTRIBUTES = {
    "a": {"href", "title", "target"},
    "div": {"role", "aria-label", "tabindex"},
    "ol": {"start"},
    "pre": {"data-language", "tabindex"},
    "td": {"align"},
    "th": {"align"},
}


def render(text: str, between: Callable[[], None] = lambda: None) -> list[str]:
    """The blocks of a text, each as HTML that is safe to put into a page.

    Takes about a millisecond a kilobyte: long texts are not for an event loop. ``between`` is
    called between blocks, and may raise to end it.

    >>> render("*Hello*\\n\\n<script>")
    ['<p><em>Hello</em></p>', '<p>&lt;script&gt;</p>']
    """
    growing = Growing()
    growing.feed(text, last=True, between=between)
    return growing.blocks


class Growing:
    """The blocks of a text that grows; each call costs what its last, open block does.

    >>> growing = Growing()
    >>> growing.feed("Hello")
    [(0, '<p>Hello</p>')]
    >>> growing.feed(" there\\n\\nBye\\n")
    [(0, '<p>Hello there</p>'), (1, '<p>Bye</p>')]
    >>> growing.feed("\\n")
    []
    """

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self._settled = 0  # blocks that no later text can change
        self._open = ""  # the text of the others
        self._wanted = 0  # characters of it at which it is rendered again
        self._num_chars = 0
        self._ends_in_return = False

    def feed(
        self, text: str, *, last: bool = False, between: Callable[[], None] = lambda: None
    ) -> list[tuple[int, str]]:
        """Add text; the blocks that changed, by number.

        While a block is long, most calls return nothing, so that all of them take linear time;
        ``last`` renders whatever waits. When ``between`` blocks something is raised, there is no
        next call.
        """
        text = text[: max(0, MAX_CHARS - self._num_chars)]
        self._num_chars += len(text)
        if self._ends_in_return and text.startswith("\n"):
            self._open = self._open[:-1]  # one line end, in two pieces
        if text:
            self._ends_in_return = text.endswith("\r")
        self._open += text.replace("\r\n", "\n").replace("\r", "\n")
        if not last and len(self._open) < self._wanted:
            return []
        tokens = _groups(_parser().parse(self._open))
        found = []
        for group in tokens:
            between()
            found.append(_html(group))
        before, at = self.blocks, self._settled
        self.blocks = before[:at] + found
        changed = [
            (i, block)
            for i, block in enumerate(found, at)
            if i >= len(before) or before[i] != block
        ]
        changed += [(i, "") for i in range(len(self.blocks), len(before))]
        self._settle(tokens)
        size = len(self._open)
        self._wanted = size + max(0, size - SMALL) // SHARE + 1
        return changed

    def _settle(self, groups: Sequence[Sequence[Token]]) -> None:
        """Forget the text of blocks that a blank line ends, once it is clear what follows it."""
        lines = self._open.split("\n")
        for i in range(len(groups) - 1, 0, -1):
            first = (groups[i][0].map or [0])[0]
            # Until its line is complete, "2" may become the next item of a list.
            if 0 < first < len(lines) - 1 and not lines[first - 1].strip():
                self._settled += i
                self._open = "\n".join(lines[first:])
                return


def _groups(tokens: Sequence[Token]) -> list[list[Token]]:
    """The tokens of each block."""
    groups: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    return groups


def _html(tokens: Sequence[Token]) -> str:
    parser = _parser()
    return _cleaner().clean(parser.renderer.render(tokens, parser.options, {})).strip()


@cache
def _parser() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "maxNesting": 20})
    md.enable(["table", "strikethrough"])
    # A definition at the end would change blocks at the beginning.
    md.disable(["reference"])
    md.use(maths).use(bare_links)
    for name, rule in _RULES.items():
        md.add_render_rule(name, rule)
    return md


@cache
def _cleaner() -> nh3.Cleaner:
    return nh3.Cleaner(
        tags={*HTML, *MATHML},
        attributes={**HTML_ATTRIBUTES, **MATHML_ATTRIBUTES},
        allowed_classes={"span": CLASSES, "div": {"wide"}},
        url_schemes={"http", "https"},
        url_relative="deny",
        link_rel="noopener noreferrer",
    )


Rule = Any  # markdown-it gives its renderer, the tokens, an index, options and an environment


def _fence(_: object, tokens: Sequence[Token], i: int, *__: object) -> str:
    token = tokens[i]
    name = token.info.strip().split(" ")[0].strip("{}.").lower()
    code = highlighted(token.content, name)
    language = f' data-language="{escapeHtml(name[:20])}"' if name else ""
    return f'<pre tabindex="0"{language}><code>{code}</code></pre>\n'


def _image(_: object, tokens: Sequence[Token], i: int, *__: object) -> str:
    """A picture would be fetched, and its address may carry what was said to somewhere else."""
    token = tokens[i]
    words = ": ".join(w for w in ("picture", token.content) if w)
    return f"<em>[{escapeHtml(words)}]</em> {escapeHtml(str(token.attrGet('src') or ''))}"


def _link(renderer: Any, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    token = tokens[i]
    token.attrs = {
        "href": str(token.attrGet("href") or ""),
        "title": str(token.attrGet("href") or ""),  # where it really leads
        "target": "_blank",
    }
    return str(renderer.renderToken(tokens, i, options, env))


def _heading(renderer: Any, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    """The page has headings of its own above."""
    tag = f"h{min(6, int(tokens[i].tag[1]) + 2)}" if tokens[i].tag < "h5" else "h6"
    return f"<{'/' if tokens[i].nesting < 0 else ''}{tag}>"


def _cell(renderer: Any, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    """Inline styles are not allowed in the page; the old attribute is."""
    style = str(tokens[i].attrs.pop("style", ""))
    if style:
        tokens[i].attrSet("align", style.rpartition(":")[2])
    return str(renderer.renderToken(tokens, i, options, env))


def _table(opening: bool) -> Rule:
    if opening:
        begin = '<div class="wide" role="region" aria-label="Table" tabindex="0"><table>'
        return lambda *_: begin
    return lambda *_: "</table></div>"


_RULES: MutableMapping[str, Rule] = {
    "fence": _fence,
    "code_block": _fence,
    "image": _image,
    "link_open": _link,
    "heading_open": _heading,
    "heading_close": _heading,
    "th_open": _cell,
    "td_open": _cell,
    "table_open": _table(True),
    "table_close": _table(False),
}
