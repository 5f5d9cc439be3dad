"""A turn's events as messages of a socket, rendered too if wanted. Tornado loop only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llmkit.gateway.sockets.messages import Html, ServerMessage, event_message

if TYPE_CHECKING:
    from llmkit.gateway.aside import Aside
    from llmkit.gateway.conversations.turns import Turn

__all__ = ["follow"]


async def follow(
    turn: Turn, after: int, rendering: Aside | None, who: str
) -> AsyncIterator[ServerMessage]:
    """What comes after event number ``after``, to the end.

    With ``rendering``, done for ``who``, blocks of HTML follow the text that they show, and before
    the end they show all of it. Those from before ``after`` are sent again, which changes nothing
    where they are.
    """
    page = None if rendering is None else Page(turn.id, rendering, who)
    if page is not None:
        for block in await page.grow(_text_until(turn, after), after):
            yield block
    async for event in turn.events(after):
        if page is not None and event.type in ("end", "error"):
            for block in await page.end():
                yield block
        message = event_message(turn.id, event)
        if message is not None:
            yield message
        if page is not None and event.type == "delta":
            for block in await page.grow(event.text, event.seq):
                yield block


def _text_until(turn: Turn, after: int) -> str:
    """The answer up to event number ``after``."""
    whole, rest = (
        "".join(event.text for event in turn.log.since(seq) if event.type == "delta")
        for seq in (0, after)
    )
    return whole[: len(whole) - len(rest)]


class Page:
    """The answer of a turn as HTML, in blocks."""

    def __init__(self, turn_id: str, rendering: Aside, who: str) -> None:
        from llmkit.gateway.web.markdown import Growing  # a tenth of a second, for who wants it

        self._turn_id, self._rendering, self._who = turn_id, rendering, who
        self._growing = Growing()
        self._seq = 0
        self._is_behind = False  # whether text came since the last block

    async def grow(self, text: str, seq: int) -> list[Html]:
        """More of the answer, up to event number ``seq``; the blocks that are new or changed."""
        self._seq = seq
        self._is_behind = self._is_behind or bool(text)
        return self._shown(await self._fed(text))

    async def end(self) -> list[Html]:
        """What is still to be shown; the last block again, if there is nothing new."""
        changed = await self._fed("", last=True)
        if not changed and self._is_behind:
            blocks = self._growing.blocks
            changed = [(len(blocks) - 1, blocks[-1])] if blocks else [(0, "")]
        return self._shown(changed)

    def _shown(self, changed: list[tuple[int, str]]) -> list[Html]:
        if changed:
            self._is_behind = False
        return [Html(self._turn_id, self._seq, index, html) for index, html in changed]

    async def _fed(self, text: str, *, last: bool = False) -> list[tuple[int, str]]:
        # Never on the loop: a short text may be a large table. While the thread works, what comes
        # is gathered, and taken as one. Whoever follows no longer needs no more of it.
        return await self._rendering.run(
            self._who,
            lambda waiting: self._growing.feed(text, last=last, between=waiting.check),
        )
