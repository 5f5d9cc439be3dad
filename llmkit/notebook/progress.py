"""A progress bar: HTML in a notebook, a line in a terminal, nothing elsewhere.

When the work is done, a notebook keeps the bar or a line of text.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from llmkit.notebook import charts
from llmkit.sessions.running import Interrupted

if TYPE_CHECKING:
    from llmkit.models.download import DownloadEvent

__all__ = ["Progress", "shown_download"]

INTERVAL_S = 0.1
PATIENCE_S = 0.5  # shorter work needs no bar


class Progress:
    """Shows ``update(done, note)`` at most ten times per second.

    ``close()`` replaces the bar with a line of text, unless ``keep``.
    """

    def __init__(self, title: str, total: float, *, keep: bool = True) -> None:
        self._title, self._total, self._keep = title, max(total, 1e-9), keep
        self._began = self._shown = time.monotonic()
        self._handle: Any = None
        self._line = False

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self._began >= PATIENCE_S and (
            now - self._shown >= INTERVAL_S or (done >= self._total and self._handle is not None)
        ):
            self._shown = now
            with contextlib.suppress(Exception):  # a closed frontend must not stop the work
                self._show(min(done / self._total, 1.0), note)

    def _show(self, share: float, note: str) -> None:
        if "IPython" in sys.modules:
            from IPython.core.getipython import get_ipython

            if getattr(get_ipython(), "kernel", None) is not None:
                self._display(share, note)
                return
        if sys.stderr.isatty():
            self._line = True
            print(
                f"\r\x1b[K{self._title}: {share:4.0%} {note}", end="", file=sys.stderr, flush=True
            )

    def _display(self, share: float, note: str) -> None:
        from IPython.display import display

        text = f"{self._title}: {share:.0%} {note}".rstrip()
        bar = charts.bar(
            self._title, f"{share:.0%} {note}".rstrip(), [(share, charts.BLUE)], width=320
        )
        label = f'role="status" aria-label="{escape(text)}"'
        bundle = {
            "text/plain": text,
            "text/html": f'<div {label} style="max-width:360px">{bar}{self.below()}</div>',
        }
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)

    def below(self) -> str:
        """HTML that is shown below the bar."""
        return ""

    def ending(self, seconds: float, *, finished: bool) -> str:
        """The line that a notebook keeps."""
        return f"{self._title} {'took' if finished else 'ended after'} {seconds:.1f} s"

    def close(self, *, finished: bool = True) -> None:
        """End the display; ``finished`` is False when the work failed or was stopped."""
        with contextlib.suppress(Exception):
            if self._handle is not None and not self._keep:
                text = self.ending(time.monotonic() - self._began, finished=finished)
                self._handle.update(
                    {
                        "text/plain": text,
                        "text/html": f'<span style="color:{charts.MUTED}">{escape(text)}</span>',
                    },
                    raw=True,
                )
            if self._line:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown_download(name: str) -> Iterator[Callable[[DownloadEvent], None]]:
    """A progress bar for the events of a download, if there are any.

    Raises `Interrupted` when it is stopped.
    """
    bars: list[Progress] = []

    def show(event: DownloadEvent) -> None:
        if event.phase in ("waiting", "downloading", "verifying"):
            if not bars:
                bars.append(Progress(f"downloading {name}", event.total, keep=False))
            bars[0].update(event.done, str(event))

    finished = False
    try:
        yield show
        finished = True
    except KeyboardInterrupt:
        if not bars:
            raise
        message = "the download was stopped; the next one goes on from there"
        raise Interrupted(message) from None
    finally:
        for bar in bars:
            bar.close(finished=finished)
