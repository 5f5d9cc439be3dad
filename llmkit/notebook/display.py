"""HTML for llmkit's types in a notebook.

The formatters are registered with IPython, so that the types themselves stay free of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.notebook import charts
from llmkit.notebook.thumbnails import media_html
from llmkit.protocol import Completion, Message
from llmkit.sessions.messages import NOTHING
from llmkit.sessions.session import Session

__all__ = ["Tokens", "completion_html", "conversation_html", "register", "tokens_html"]


def register() -> None:
    """Register with the running IPython, if any; idempotent."""
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if shell is not None:
        html = shell.display_formatter.formatters["text/html"]
        html.for_type(Completion, completion_html)
        html.for_type(Session, lambda s: conversation_html(s.messages, s.files))


def completion_html(c: Completion) -> str:
    """The text, with its token counts, speed and finish reason."""
    rate = "" if math.isnan(c.decode_tok_s) else f", {c.decode_tok_s:.0f} tokens/s"
    cached = f" ({c.usage.cached_tokens} cached)" if c.usage.cached_tokens else ""
    note = (
        f"{c.usage.prompt_tokens} prompt tokens{cached} → "
        f"{c.usage.completion_tokens} tokens{rate}; ended by {c.finish_reason.value}"
    )
    style = "white-space:pre-wrap;margin-bottom:6px"
    text = f'<div class="{charts.NO_MATH}" style="{style}">{escape(c.text)}</div>'
    return f'{text}<div style="color:{charts.MUTED};font-size:90%">{escape(note)}</div>'


def conversation_html(messages: Sequence[Message], files: Mapping[str, bytes] = NOTHING) -> str:
    """Chat bubbles: the user's messages on the right, the others on the left. ``files`` are those
    of their pictures, by digest."""
    bubbles = "".join(_bubble(message, files) for message in messages) or "no messages yet"
    return (
        f'<div class="{charts.NO_MATH}" role="log" aria-label="conversation" '
        f'style="max-width:760px">{bubbles}</div>'
    )


def _bubble(message: Message, files: Mapping[str, bytes]) -> str:
    mine = message.role == "user"
    side = "margin-left:15%" if mine else "margin-right:15%"
    back = (
        "var(--jp-layout-color2, rgba(127,127,127,0.15))"
        if mine
        else "var(--jp-layout-color1, transparent)"
    )
    calls = "".join(f"\n{c.name}({c.arguments})" for c in message.tool_calls)
    return (
        f'<div style="{side};margin-top:6px;padding:6px 10px;border:1px solid {charts.LINE};'
        f'border-radius:8px;background:{back};white-space:pre-wrap">'
        f'<div style="color:{charts.MUTED};font-size:85%">{escape(message.role)}</div>'
        f"{media_html(message.media, files)}{escape(message.text + calls)}</div>"
    )


class Tokens:
    """A completion's tokens with their probabilities, as colours and as text."""

    def __init__(self, completion: Completion) -> None:
        if not completion.logprobs:
            raise InvalidRequestError(
                "the completion has no probabilities; generate it with e.g. logprobs=3.", "logprobs"
            )
        self.completion = completion

    def __repr__(self) -> str:
        return " ".join(
            f"{e.piece.decode('utf-8', 'replace')!r} {math.exp(e.logprob or 0.0):.0%}"
            for e in self.completion.logprobs
        )

    def _repr_html_(self) -> str:
        return tokens_html(self.completion)


def tokens_html(completion: Completion) -> str:
    """A completion's tokens, on a darker background the less probable they were.

    Each token's tooltip has its probability and the likeliest alternatives.
    """
    parts = []
    for entry in completion.logprobs:
        probability = math.exp(entry.logprob if entry.logprob is not None else 0.0)
        others = ", ".join(
            f"{piece.decode('utf-8', 'replace')!r} {math.exp(p):.0%}" for _, piece, p in entry.top
        )
        note = f"{probability:.1%}" + (f"; {others}" if others else "")
        ground = f"rgba(201,114,10,{(1 - probability) * 0.75:.2f})"
        text = escape(entry.piece.decode("utf-8", "replace"))
        parts.append(f'<span title="{escape(note)}" style="background:{ground}">{text}</span>')
    legend = (
        f'<div style="color:{charts.MUTED};font-size:90%">'
        "the darker the ground, the less probable the token</div>"
    )
    style = "white-space:pre-wrap;line-height:1.6;max-width:760px"
    return f'<div class="{charts.NO_MATH}" style="{style}">{"".join(parts)}</div>{legend}'
