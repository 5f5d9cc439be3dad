"""Code as HTML, with the classes of Pygments. Pure."""

from __future__ import annotations

import time
from functools import cache

from markdown_it.common.utils import escapeHtml
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES, _TokenType

__all__ = ["CLASSES", "highlighted"]

MAX_CHARS = 20_000  # of code with colours
# Pygments' lexers take quadratic time for some texts: from here on the text has no colours.
MAX_LINE = 1000  # characters
MAX_CPU_S = 0.1
LANGUAGES = [
    *("bash", "c", "cpp", "csharp", "css", "diff", "docker", "go", "haskell", "html", "ini"),
    *("java", "javascript", "json", "julia", "kotlin", "latex", "lua", "make", "markdown", "php"),
    *("powershell", "python", "r", "ruby", "rust", "scala", "sql", "swift", "toml", "typescript"),
    *("xml", "yaml"),
]
ALIASES = {
    **{"c#": "csharp", "c++": "cpp", "cs": "csharp", "dockerfile": "docker", "hs": "haskell"},
    **{"js": "javascript", "jsx": "javascript", "kt": "kotlin", "makefile": "make"},
    **{"md": "markdown", "py": "python", "python3": "python", "rb": "ruby", "rs": "rust"},
    **{"sh": "bash", "shell": "bash", "svg": "xml", "tex": "latex", "ts": "typescript"},
    **{"tsx": "typescript", "yml": "yaml", "zsh": "bash"},
}
PLAIN = {"", "n", "p", "w", "x"}  # names, punctuation and blanks look like the rest
CLASSES = set(STANDARD_TYPES.values()) - PLAIN


def highlighted(code: str, language: str) -> str:
    """The code, escaped; with colours if the language is known and it does not take too long.

    >>> highlighted("x = 1 < 2", "python")
    'x <span class="o">=</span> <span class="mi">1</span> <span class="o">&lt;</span> \
<span class="mi">2</span>'
    """
    name = ALIASES.get(language, language)
    if name not in LANGUAGES or len(code) > MAX_CHARS:
        return escapeHtml(code)
    if max(map(len, code.split("\n"))) > MAX_LINE:  # one match may take seconds in a line so long
        return escapeHtml(code)
    end = time.thread_time() + MAX_CPU_S
    pieces: list[str] = []
    for position, kind, text in _lexer(name).get_tokens_unprocessed(code):
        if time.thread_time() > end:
            pieces.append(escapeHtml(code[position:]))
            break
        name = _class_of(kind)
        escaped = escapeHtml(text)
        pieces.append(f'<span class="{name}">{escaped}</span>' if name else escaped)
    return "".join(pieces)


@cache
def _lexer(name: str) -> Lexer:
    return get_lexer_by_name(name)


@cache
def _class_of(kind: _TokenType) -> str:
    """The class of a token, or of the kind that it belongs to."""
    while kind not in STANDARD_TYPES and kind.parent is not None:
        kind = kind.parent
    name = str(STANDARD_TYPES[kind])
    return "" if name in PLAIN else name
