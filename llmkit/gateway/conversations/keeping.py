"""One reply on its way into the store: checkpoints while it is written, then all of it.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.errors import StoreError
from llmkit.gateway.conversations.objects import message_object
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.failures import ApiError
from llmkit.protocol import Completion, FinishReason, ToolCall
from llmkit.store.conversation_records import NewMessage, Status, StoredMessage, usage_of

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["Keeping"]

logger = logging.getLogger("llmkit.gateway")

CHECKPOINT_S = 1.0
RETRIES_S = (0.2, 1.0, 3.0)  # for the end of a reply, when the database is in trouble
REFUSALS = (400, 413, 429)  # of an engine: the question was not taken


class Keeping:
    """Stores a running ``reply`` of an owner, perhaps one that is still being ``begun``.

    ``take`` its events, give its ``completion``, and ``end``. ``prefix`` is the beginning that its
    caller gave. ``pruned`` says what was left out of its prompt.
    """

    def __init__(
        self,
        shelf: Shelf,
        owner: str,
        reply: StoredMessage | None = None,
        *,
        begun: Coroutine[Any, Any, StoredMessage] | None = None,
        prefix: str = "",
        pruned: dict[str, Any] | None = None,
    ) -> None:
        self._shelf, self._owner, self._reply = shelf, owner, reply
        self._begun = None if begun is None else asyncio.ensure_future(begun)
        self._ending: asyncio.Task[None] | None = None
        self._pruned = pruned
        self._text, self._reasoning = [prefix] if prefix else [], [""]
        self._calls: list[ToolCall] = []
        self._prefix = prefix
        self.size = len(prefix)
        self.completion: Completion | None = None
        self.is_over = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def reply(self) -> StoredMessage:
        """The reply, once it is begun."""
        assert self._reply is not None
        return self._reply

    async def begun(self) -> None:
        """Wait until question and reply are stored. Raises what the store raises."""
        if self._reply is None:
            assert self._begun is not None
            self._reply = await asyncio.shield(self._begun)

    @property
    def shown(self) -> dict[str, Any]:
        """The reply as an object."""
        return message_object(self.reply)

    @property
    def is_empty(self) -> bool:
        return self.size == len(self._prefix) and not self._calls

    def take(self, events: Sequence[Event]) -> None:
        """More of the reply. Raises what the store raised when it was begun."""
        if self._reply is None and self._begun is not None and self._begun.done():
            self._reply = self._begun.result()
        for event in events:
            match event:
                case Content(text):
                    self._text.append(text)
                    self.size += len(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                    self.size += len(text)
                case Call():
                    self._calls.append(ToolCall(event.call_id, event.name, event.arguments))
                    self.size += len(event.arguments)
        if self._timer is None and events:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(CHECKPOINT_S, self._checkpoint)

    def _checkpoint(self) -> None:
        if self.is_over:
            return
        reply = self._reply
        if reply is None or self._shelf.is_behind(self._owner, reply.conversation_id):
            self._timer = None  # the database is slow
            return
        self._text, self._reasoning = ["".join(self._text)], ["".join(self._reasoning)]
        text, thoughts = self._text[0], self._reasoning[0] or None
        ids = reply.conversation_id, reply.id
        call = self._shelf.call(
            self._owner, lambda s: s.update_reply(*ids, text, thoughts), reply.conversation_id
        )
        call.add_done_callback(self._checkpointed)

    def _checkpointed(self, call: asyncio.Future[None]) -> None:
        self._timer = None
        if not call.cancelled() and (error := call.exception()) is not None:
            logger.warning("an answer could not be stored meanwhile: %s", error)

    async def end(self, failure: ApiError | None = None, *, comes_again: bool = False) -> None:
        """Store the whole reply; without a completion as partial.

        A question that the engine refused, or that ``comes_again``, is taken back if there is
        nothing of an answer. Raises what the store raises. Once it was called, further calls wait
        for its end.
        """
        ending = self.start_end(failure, comes_again=comes_again)
        while not ending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([ending])
        ending.result()

    def start_end(
        self, failure: ApiError | None = None, *, comes_again: bool = False
    ) -> asyncio.Task[None]:
        """`end` without waiting for it."""
        if self._ending is None:
            self.is_over = True
            self._ending = asyncio.ensure_future(self._end(failure, comes_again))
        return self._ending

    async def _end(self, failure: ApiError | None, comes_again: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        is_refused = comes_again or (failure is not None and failure.status in REFUSALS)
        is_refused = is_refused and self.is_empty
        if self._begun is not None:
            if is_refused:
                self._begun.cancel()  # unless it is under way already
            await asyncio.wait([self._begun])
            if self._begun.cancelled() or self._begun.exception() is not None:
                return  # nothing was stored
            self._reply = self._begun.result()
        ids = self.reply.conversation_id, self.reply.id
        if is_refused:
            await self._surely(lambda store: store.cancel_turn(*ids))
            return
        done = self.completion
        status: Status = "partial" if done is None else "complete"
        reason = self._reason(failure)
        message = NewMessage(
            "assistant",
            "".join(self._text),
            reasoning="".join(self._reasoning) or None,
            tool_calls=tuple(self._calls),
            model=self.reply.model,
        )
        usage = self._usage
        self._reply = replace(  # so that it is shown even if it cannot be stored
            self.reply,
            content=message.content,
            reasoning=message.reasoning,
            tool_calls=message.tool_calls,
            status="partial",
            finish_reason=reason,
            usage=usage,
        )
        self._reply = await self._surely(
            lambda store: store.end_reply(
                *ids, message, status=status, finish_reason=reason, usage=usage
            )
        )

    async def _surely(self, run: Callable[[ConversationStore], Any]) -> Any:
        """Run it on a thread, again if the database is in trouble. Raises what it raises; if that
        is still in trouble, it is run later all the same."""
        reply = self.reply
        for wait in (*RETRIES_S, None):
            try:
                result, _ = await self._shelf.finish(self._owner, run, reply.conversation_id)
                return result
            except StoreError:
                if wait is None:
                    self._shelf.postpone(
                        lambda stores: run(stores.conversations),
                        lambda stores: stores.conversations.give_up(reply.id),
                        self.size,
                    )
                    raise
                await asyncio.sleep(wait)

    def _reason(self, failure: ApiError | None) -> str:
        done = self.completion
        if done is None:
            return (FinishReason.ABORT if failure is None else FinishReason.ERROR).value
        if self._calls and done.finish_reason is FinishReason.STOP:
            return FinishReason.TOOL_CALLS.value
        return done.finish_reason.value

    @property
    def _usage(self) -> dict[str, Any] | None:
        done = self.completion
        pruned = {} if self._pruned is None else {"pruned": self._pruned}
        if done is None:
            return pruned or None
        return {**usage_of(done), **pruned}
