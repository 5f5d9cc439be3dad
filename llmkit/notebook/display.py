"""How llmkit's plain types look in a notebook: formatters registered with IPython, so that the types themselves know nothing of HTML."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from llmkit.notebook import charts
from llmkit.types import Completion

__all__ = ["completion_html", "register"]


def register() -> None:
    """Register with the running IPython, if there is one; again does no harm."""
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(Completion, completion_html)


def completion_html(c: Completion) -> str:
    """The text, and what it took."""
    rate = "" if math.isnan(c.decode_tok_s) else f", {c.decode_tok_s:.0f} tokens/s"
    cached = f" ({c.usage.cached_tokens} cached)" if c.usage.cached_tokens else ""
    note = f"{c.usage.prompt_tokens} prompt tokens{cached} → {c.usage.completion_tokens} tokens{rate}; ended by {c.finish_reason.value}"
    text = f'<div style="white-space:pre-wrap;margin-bottom:6px">{escape(c.text)}</div>'
    return f'{text}<div style="color:{charts.MUTED};font-size:90%">{escape(note)}</div>'
