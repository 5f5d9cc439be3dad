"""`llm.chat_panel()`: a conversation in widgets that never blocks the kernel. A thread reads the stream; the session keeps what was said."""

from __future__ import annotations

import threading
import time
from functools import cache
from html import escape
from importlib.util import find_spec
from typing import Any

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
        self._lock = threading.RLock()
        self._widgets: dict[str, Any] | None = None
        self._said = ""  # last
        self._error = ""
        self._made: dict[tuple[str, str], str] = {}

    # -- what the buttons do; any thread

    @property
    def busy(self) -> bool:
        """An answer is coming."""
        return self._turn is not None

    def send(self, text: str) -> None:
        """Say something; returns at once."""
        with self._lock:
            if self._turn is not None or not text.strip():
                return
            self._said, self._error = text, ""
            try:
                self._turn = turn = self.session.stream(text)
            except Exception as error:
                self._fail(error)
                if self._widgets is not None and not self._widgets["box"].value:
                    self._widgets["box"].value = self._said  # later the next message may be half typed: then "Edit last" gives it back
            else:
                self._thread = threading.Thread(target=self._read, args=(turn,), name="llmkit-chat-panel", daemon=True)
                self._thread.start()
            self._show()

    def stop(self) -> None:
        """End the answer that is coming; what there is of it stays."""
        turn = self._turn
        if turn is not None:
            turn.stop()

    def edit(self) -> str:
        """Take the last turn back, and give what was said in it."""
        with self._lock:
            if self._turn is not None:
                return ""
            if self._error:  # it never became a turn
                said = self._said
            else:
                said = next((m.content for m in reversed(self.session.messages) if m.role == "user"), "")
                self.session.undo()
            self._error = ""
            self._show()
            return said

    def clear(self) -> None:
        """Start over; instructions stay."""
        self.stop()
        self.wait(5)
        with self._lock:
            if self._turn is not None:
                return  # it does not end: better a long conversation than half of one
            self.session.messages[:] = [m for m in self.session.messages if m.role == "system"]
            self._error = ""
            self._show()

    def wait(self, timeout: float | None = None) -> None:
        """Until the answer is there."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _read(self, turn: Turn) -> None:
        shown = 0.0
        failure: Exception | None = None
        try:
            for _ in turn:
                if time.monotonic() - shown >= INTERVAL_S:
                    shown = time.monotonic()
                    with self._lock:
                        self._show(turn.text)
        except Exception as error:
            failure = error
        with self._lock:
            self._turn = None
            if failure is not None:
                self._fail(failure)
            self._show()

    def _fail(self, error: Exception) -> None:
        """Say what is wrong."""
        self._error = str(error) or type(error).__name__

    # -- how it looks

    def html(self) -> str:
        """The conversation so far."""
        said = [(m.role, m.content) for m in self.session.messages if m.role in ("user", "assistant")]
        # What was said does not change: it is made once, and what is not there any more is forgotten.
        self._made = {entry: self._made.get(entry) or _said(*entry) for entry in said}
        return "".join(self._made[entry] for entry in said) or ("" if self.busy else f'<span style="color:{charts.MUTED}">Say something below.</span>')

    def _coming(self, text: str | None) -> str:
        """The answer that is coming, and what went wrong."""
        parts = [_said("user", self._said), _said("assistant", (text or "") + " ▍")] if self._turn is not None else []
        if self._error:
            parts.append(f'<div role="alert" style="color:var(--jp-error-color1, #c62828);margin-top:6px">{escape(self._error)}</div>')
        return "".join(parts)

    def _show(self, text: str | None = None) -> None:
        """With the lock held."""
        widgets = self._widgets
        if widgets is None:
            return
        busy = self._turn is not None
        coming = self._coming(text)
        if text is None:  # the conversation itself changes only between answers
            said = self.html()
            if widgets["log"].value != said:
                widgets["log"].value = said
        widgets["coming"].value = coming
        widgets["stop"].disabled = not busy
        widgets["send"].disabled = widgets["edit"].disabled = busy
        state = "answering" if busy else "not sent" if self._error else "answer complete" if self.session.num_turns else "ready"
        value = f'<span role="status" aria-live="polite" style="color:{charts.MUTED}">{escape(state)}</span>'
        if widgets["state"].value != value:
            widgets["state"].value = value

    def _make(self) -> dict[str, Any]:
        import ipywidgets as w

        log, coming = w.HTML(self.html()), w.HTML("")
        # From the bottom up: the newest stays in sight while it grows, and scrolling up is left alone.
        window = w.Box([coming, log], layout=w.Layout(display="flex", flex_flow="column-reverse", max_height="420px", overflow="auto"))
        # Its text comes when it is left: letter by letter, the last ones could arrive after the click on Send.
        box = w.Textarea(description="Message", continuous_update=False, layout=w.Layout(width="98%", height="64px"), style={"description_width": "auto"})
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
        panel = w.VBox([title, window, box, buttons], layout=w.Layout(border=f"1px solid {charts.LINE}", padding="8px", max_width="760px"))
        return {"panel": panel, "log": log, "coming": coming, "box": box, "send": send, "stop": stop, "edit": edit, "clear": clear, "state": state}

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
        f'<div class="{charts.NO_MATH}" style="{side};margin-top:6px;padding:4px 10px;border:1px solid {charts.LINE};border-radius:8px;background:{back}">'
        f'<div style="color:{charts.MUTED};font-size:85%">{who}</div>{body}</div>'
    )


def as_html(text: str) -> str:
    """Markdown as HTML. HTML in it is text, pictures are not fetched, and links lead only to the web and to mail."""
    if find_spec("mistune") is None:
        return f'<div style="white-space:pre-wrap">{escape(text)}</div>'

    return str(_markdown()(text))


@cache
def _markdown() -> Any:
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def image(self, text: str, url: str, title: str | None = None) -> str:
            return escape(f"{text} ({url})")

        def link(self, text: str, url: str, title: str | None = None) -> str:
            if not url.lower().startswith(("http://", "https://", "mailto:")):
                return f"{text} ({escape(url)})"
            return f'<a href="{escape(url, quote=True)}" target="_blank" rel="noopener noreferrer">{text}</a>'

    return mistune.create_markdown(escape=True, renderer=Renderer(escape=True), plugins=["table", "strikethrough"])
