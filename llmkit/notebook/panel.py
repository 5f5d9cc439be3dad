"""`llm.chat_panel()`: a conversation in widgets that never blocks the kernel. A thread reads the stream; the session keeps what was said."""

from __future__ import annotations

import threading
import time
from html import escape
from typing import Any

from llmkit.errors import LLMKitError
from llmkit.notebook import charts
from llmkit.session import Session, Turn

__all__ = ["ChatPanel", "as_html"]

INTERVAL_S = 0.1  # between two pictures of an answer that is coming


class ChatPanel:
    """A chat beside your code: send, stop, edit what you said last and send it again, start over. ``session`` has the conversation, for your code as well.

    Shows itself as widgets, and as the conversation's text and HTML where there are none (in a saved notebook, say).
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session, self._name = session, name
        self._turn: Turn | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._widgets: dict[str, Any] | None = None
        self._pending = ""
        self._error = ""

    # -- what the buttons do; any thread

    @property
    def busy(self) -> bool:
        """An answer is coming."""
        return self._thread is not None and self._thread.is_alive()

    def send(self, text: str) -> None:
        """Say something; returns at once."""
        with self._lock:
            if self.busy or not text.strip():
                return
            self._pending, self._error = text, ""
            try:
                self._turn = self.session.stream(text)
            except LLMKitError as error:
                self._error = str(error)
                self._turn = None
            else:
                self._thread = threading.Thread(target=self._read, args=(self._turn,), name="llmkit-chat-panel", daemon=True)
                self._thread.start()
        self._show()

    def stop(self) -> None:
        """End the answer that is coming; what there is of it stays."""
        turn = self._turn
        if turn is not None:
            turn.stop()

    def edit(self) -> str:
        """Take the last turn back, and give what was said in it."""
        if self.busy:
            return ""
        said = next((m.content for m in reversed(self.session.messages) if m.role == "user"), "")
        self.session.undo()
        self._error = ""
        self._show()
        return said

    def clear(self) -> None:
        """Start over; instructions stay."""
        self.stop()
        if self._thread is not None:
            self._thread.join(2)
        self.session.messages[:] = [m for m in self.session.messages if m.role == "system"]
        self._error = ""
        self._show()

    def wait(self, timeout: float | None = None) -> None:
        """Until the answer is there."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _read(self, turn: Turn) -> None:
        shown = 0.0
        try:
            for _ in turn:
                if time.monotonic() - shown >= INTERVAL_S:
                    shown = time.monotonic()
                    self._show(turn.text)
        except LLMKitError as error:
            self._error = str(error)
        finally:
            self._turn = None
            self._show(done=True)

    # -- how it looks

    def html(self, coming: str | None = None) -> str:
        """The conversation, with an answer that is coming."""
        parts = [_said(m.role, m.content) for m in self.session.messages if m.role in ("user", "assistant")]
        if coming is not None:
            parts += [_said("user", self._pending), _said("assistant", coming + " ▍")]
        if self._error:
            parts.append(f'<div role="alert" style="color:var(--jp-error-color1, #c62828);margin-top:6px">{escape(self._error)}</div>')
        empty = f'<span style="color:{charts.MUTED}">Say something below.</span>'
        return f'<div style="max-height:420px;overflow-y:auto;padding:4px">{"".join(parts) or empty}</div>'

    def _show(self, coming: str | None = None, done: bool = False) -> None:
        widgets = self._widgets
        if widgets is None:
            return
        busy = not done and self.busy
        widgets["log"].value = self.html("" if coming is None and busy else coming if busy else None)
        widgets["stop"].disabled = not busy
        widgets["send"].disabled = widgets["edit"].disabled = busy
        state = "answering" if busy else self._error or "answer complete" if self.session.messages else "ready"
        widgets["state"].value = f'<span role="status" aria-live="polite" style="color:{charts.MUTED}">{escape(state)}</span>'

    def _make(self) -> dict[str, Any]:
        import ipywidgets as w

        log = w.HTML(self.html())
        box = w.Textarea(placeholder="Your message", layout=w.Layout(width="100%", height="64px"), tooltip="Your message")
        send = w.Button(description="Send", button_style="primary", icon="paper-plane", tooltip="Send the message")
        stop = w.Button(description="Stop", icon="stop", disabled=True, tooltip="End the answer here")
        edit = w.Button(description="Edit last", icon="pencil", tooltip="Take the last message back to change and resend it")
        clear = w.Button(description="Clear", icon="trash", tooltip="Start the conversation over")
        state = w.HTML(f'<span role="status" aria-live="polite" style="color:{charts.MUTED}">ready</span>')

        def on_send(_: Any) -> None:
            text, box.value = box.value, ""
            self.send(text)

        def on_edit(_: Any) -> None:
            box.value = self.edit() or box.value

        send.on_click(on_send)
        stop.on_click(lambda _: self.stop())
        edit.on_click(on_edit)
        clear.on_click(lambda _: self.clear())
        title = w.HTML(f"<strong>Chat with {escape(self._name)}</strong>")
        buttons = w.HBox([send, stop, edit, clear, state])
        panel = w.VBox([title, log, box, buttons], layout=w.Layout(border=f"1px solid {charts.LINE}", padding="8px", max_width="760px"))
        return {"panel": panel, "log": log, "box": box, "send": send, "stop": stop, "edit": edit, "clear": clear, "state": state}

    def __repr__(self) -> str:
        return f"ChatPanel with {self._name}\n{self.session!r}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": f'<div role="log">{self.html()}</div>'}
        try:
            if self._widgets is None:
                self._widgets = self._make()
        except ImportError:
            return bundle
        return {**(self._widgets["panel"]._repr_mimebundle_() or {}), **bundle}


def _said(role: str, text: str) -> str:
    mine = role == "user"
    side = "margin-left:12%" if mine else "margin-right:12%"
    back = "var(--jp-layout-color2, rgba(127,127,127,0.15))" if mine else "transparent"
    body = f'<div style="white-space:pre-wrap">{escape(text)}</div>' if mine else as_html(text)
    who = "You" if mine else "Model"
    return (
        f'<div style="{side};margin-top:6px;padding:4px 10px;border:1px solid {charts.LINE};border-radius:8px;background:{back}">'
        f'<div style="color:{charts.MUTED};font-size:85%">{who}</div>{body}</div>'
    )


def as_html(text: str) -> str:
    """Markdown as HTML; HTML in it is text, and links go nowhere but to http, https and mailto."""
    try:
        import mistune
    except ImportError:
        return f'<div style="white-space:pre-wrap">{escape(text)}</div>'
    return str(mistune.create_markdown(escape=True, plugins=["table", "strikethrough"])(text))
