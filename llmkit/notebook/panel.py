"""`llm.chat_panel()`: a conversation in widgets that never blocks the kernel.

A thread reads the stream; the session holds the conversation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.util import find_spec
from typing import Any

from llmkit.errors import LLMKitError
from llmkit.notebook import charts
from llmkit.notebook.thumbnails import media_html
from llmkit.protocol import Media, Message
from llmkit.sessions.messages import NOTHING, with_media
from llmkit.sessions.session import Session, Turn

__all__ = ["ChatPanel", "as_html"]

INTERVAL_S = 0.1  # between updates of a streaming answer
Entry = tuple[str, str, tuple[Media, ...]]  # a message: role, text, pictures and sounds


@dataclass(frozen=True, slots=True)
class Attached:
    """Pictures and sounds that go with a message, as `with_media` takes them."""

    images: Any = ()
    sounds: Any = ()


class ChatPanel:
    """A chat next to your code: send, stop, edit and resend the last message, start over.

    ``session`` holds the conversation; your code may use it too. With ``sees`` there is a button
    for pictures. Displays as widgets, or as the
    conversation's text and HTML where there are none (in a saved notebook, for instance).
    """

    def __init__(self, session: Session, name: str, *, sees: bool = False) -> None:
        self.session, self._name, self._sees = session, name, sees
        self._turn: Turn | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._widgets: dict[str, Any] | None = None
        self._said = ""  # the last message sent
        self._shown: tuple[Media, ...] = ()  # what went with it
        self._again = Attached()  # what went with a message that was taken back
        self._error = ""
        self._rendered: dict[Entry, str] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is streaming."""
        return self._turn is not None

    def send(self, text: str, images: Any = ()) -> None:
        """Send a message, with pictures as for `LLM.chat`; returns at once.

        After ``edit()`` it also has the sounds of the message that was taken back, and its pictures
        unless others are given.
        """
        with self._lock:
            if self._turn is not None or not text.strip():
                return
            self._said, self._shown, self._error = text, (), ""
            try:
                branch = self.session.fork(
                    stored=False
                )  # joins the conversation at its end, unless cleared
                given = self._given(images)
                (asked,) = with_media(
                    [Message("user", text)], branch.files, given.images, given.sounds
                )
                self._shown, self._again = asked.media, self._files(asked.media)
                self._turn = turn = branch.stream(
                    text, images=self._again.images, sounds=self._again.sounds
                )
                self._again = Attached()
            except Exception as error:
                self._fail(error)
                # Put the message back, unless the next one is being typed: then "Edit last" does.
                box = None if self._widgets is None else self._widgets["box"]
                if box is not None and not box.value:
                    box.value = self._said
            else:
                self._thread = threading.Thread(
                    target=self._read, args=(turn, branch), name="llmkit-chat-panel", daemon=True
                )
                self._thread.start()
            self._show()

    def stop(self) -> None:
        """Stop the streaming answer; the partial answer stays."""
        turn = self._turn
        if turn is not None:
            turn.stop()

    def edit(self) -> str:
        """Remove the last turn and return its message."""
        with self._lock:
            if self._turn is not None:
                return ""
            if self._error:  # the message never became a turn
                message = self._said
                if self._shown:
                    self._again = self._files(self._shown)
                self._error = ""
            else:
                last = next((m for m in reversed(self.session.messages) if m.role == "user"), None)
                if last is None:
                    return ""
                message, self._again = last.text, self._files(last.media)
                self._said, self._shown = message, last.media
                self._write(self.session.undo)
            self._show()
            return message

    def _given(self, images: Any) -> Attached:
        """What goes with a message: these pictures, else those taken back; and the sounds."""
        if images is None or (isinstance(images, list | tuple) and not images):
            # Should it be refused, the next message must not be refused for it, too.
            given, self._again = self._again, Attached()
            return given
        return Attached(images, self._again.sounds)

    def _files(self, media: Sequence[Media]) -> Attached:
        found, files = Attached([], []), self.session.files
        for item in media:
            if item.digest in files:
                kind = found.images if item.kind == "image" else found.sounds
                kind.append(files[item.digest])
        return found

    def clear(self) -> None:
        """Start over, at once; system messages stay, and a streaming answer is dropped."""
        with self._lock:
            self.stop()
            self._turn = None
            self._again = Attached()
            self.session.messages[:] = [m for m in self.session.messages if m.role == "system"]
            self._said, self._shown, self._error = "", (), ""
            self._write(self.session.commit)
            self._show()

    def _write(self, change: Callable[[], None]) -> None:
        """Change a conversation that may be in a database."""
        try:
            change()
        except LLMKitError as error:
            self._fail(error)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the answer."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _read(self, turn: Turn, branch: Session) -> None:
        shown, before = 0.0, len(branch)
        failure: Exception | None = None
        try:
            for _ in turn:
                if time.monotonic() - shown >= INTERVAL_S:
                    shown = time.monotonic()
                    with self._lock:
                        if self._turn is turn:
                            self._show(turn.text)
        except Exception as error:
            failure = error
        with self._lock:
            if self._turn is not turn:
                return  # cleared
            self._turn = None
            self.session.messages.extend(branch.messages[before:])
            try:
                self.session.commit()
            except LLMKitError as error:
                failure = failure or error
            if failure is not None:
                self._fail(failure)
            self._show()

    def _fail(self, error: Exception) -> None:
        self._error = str(error) or type(error).__name__

    def html(self) -> str:
        """The conversation so far."""
        messages = self.session.messages
        entries = [(m.role, m.text, m.media) for m in messages if m.role in ("user", "assistant")]
        # Messages do not change: each is rendered once, and dropped with its message.
        files = self.session.files
        self._rendered = {e: self._rendered.get(e) or _message_html(*e, files) for e in entries}
        return "".join(self._rendered[e] for e in entries) or (
            "" if self.busy else f'<span style="color:{charts.MUTED}">Say something below.</span>'
        )

    def _coming(self, text: str | None) -> str:
        """The streaming turn, and the last error."""
        parts = (
            [
                _message_html("user", self._said, self._shown, self.session.files),
                _message_html("assistant", (text or "") + " ▍"),
            ]
            if self._turn is not None
            else []
        )
        if self._error:
            parts.append(
                '<div role="alert" style="color:var(--jp-error-color1, #c62828);margin-top:6px">'
                f"{escape(self._error)}</div>"
            )
        return "".join(parts)

    def _show(self, text: str | None = None) -> None:
        """Update the widgets. The caller holds the lock."""
        widgets = self._widgets
        if widgets is None:
            return
        busy = self._turn is not None
        coming = self._coming(text)
        if text is None:  # the conversation itself changes only between answers
            log = self.html()
            if widgets["log"].value != log:
                widgets["log"].value = log
        widgets["coming"].value = coming
        widgets["stop"].disabled = not busy
        widgets["send"].disabled = widgets["edit"].disabled = busy
        state = (
            "answering"
            if busy
            else "not sent"
            if self._error
            else "answer complete"
            if self.session.num_turns
            else "ready"
        )
        value = _state_html(state)
        if widgets["state"].value != value:
            widgets["state"].value = value

    def _make(self) -> dict[str, Any]:
        import ipywidgets as w

        log, coming = w.HTML(self.html()), w.HTML("")
        # Bottom up: the latest text stays in view as it grows, unless the user scrolls up.
        window = w.Box(
            [coming, log],
            layout=w.Layout(
                display="flex", flex_flow="column-reverse", max_height="420px", overflow="auto"
            ),
        )
        # Sent on blur: sent per keystroke, the last ones could arrive after the click on Send.
        box = w.Textarea(
            description="Message",
            continuous_update=False,
            layout=w.Layout(width="98%", height="64px"),
            style={"description_width": "auto"},
        )
        send = w.Button(
            description="Send",
            button_style="primary",
            icon="paper-plane",
            tooltip="Send the message",
        )
        stop = w.Button(description="Stop", icon="stop", disabled=True, tooltip="Stop the answer")
        edit = w.Button(
            description="Edit last",
            icon="pencil",
            tooltip="Take the last message back to change and resend it",
        )
        clear = w.Button(description="Clear", icon="trash", tooltip="Start the conversation over")
        state = w.HTML(_state_html("ready"))

        picture = w.FileUpload(
            accept="image/*", multiple=True, description="Picture", tooltip="Send pictures with it"
        )

        def on_send(_: Any) -> None:
            with self._lock:
                if self.busy or not box.value.strip():
                    return  # what is there goes with the next message
                text, box.value = box.value, ""
                images, picture.value = [bytes(each["content"]) for each in picture.value], ()
                self.send(text, images)

        def on_edit(_: Any) -> None:
            box.value = self.edit() or box.value

        send.on_click(on_send)
        stop.on_click(lambda _: self.stop())
        edit.on_click(on_edit)
        clear.on_click(lambda _: self.clear())
        title = w.HTML(f"<strong>Chat with {escape(self._name)}</strong>")
        buttons = w.HBox([send, *([picture] if self._sees else []), stop, edit, clear, state])
        panel = w.VBox(
            [title, window, box, buttons],
            layout=w.Layout(border=f"1px solid {charts.LINE}", padding="8px", max_width="760px"),
        )
        return {
            "panel": panel,
            "log": log,
            "coming": coming,
            "box": box,
            "send": send,
            "stop": stop,
            "edit": edit,
            "clear": clear,
            "state": state,
        }

    def __repr__(self) -> str:
        return f"ChatPanel with {self._name}\n{self.session!r}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {
            "text/plain": repr(self),
            "text/html": f'<div role="log">{self.html()}</div>',
        }
        try:
            if self._widgets is None:
                self._widgets = self._make()
        except ImportError:
            return bundle
        return {**(self._widgets["panel"]._repr_mimebundle_() or {}), **bundle}


def _state_html(state: str) -> str:
    style = f"color:{charts.MUTED}"
    return f'<span role="status" aria-live="polite" style="{style}">{escape(state)}</span>'


def _message_html(
    role: str, text: str, media: Sequence[Media] = (), files: Mapping[str, bytes] = NOTHING
) -> str:
    mine = role == "user"
    side = "margin-left:12%" if mine else "margin-right:12%"
    back = "var(--jp-layout-color2, rgba(127,127,127,0.15))" if mine else "transparent"
    body = f'<div style="white-space:pre-wrap">{escape(text)}</div>' if mine else as_html(text)
    body = media_html(media, files) + body
    who = "You" if mine else "Model"
    return (
        f'<div class="{charts.NO_MATH}" style="{side};margin-top:6px;padding:4px 10px;'
        f'border:1px solid {charts.LINE};border-radius:8px;background:{back}">'
        f'<div style="color:{charts.MUTED};font-size:85%">{who}</div>{body}</div>'
    )


def as_html(text: str) -> str:
    """Markdown as HTML; HTML is escaped, images become text, links are http(s) or mailto only."""
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
            href = escape(url, quote=True)
            return f'<a href="{href}" target="_blank" rel="noopener noreferrer">{text}</a>'

    return mistune.create_markdown(
        escape=True, renderer=Renderer(escape=True), plugins=["table", "strikethrough"]
    )
