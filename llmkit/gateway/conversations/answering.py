"""What a turn does, within the gateway's stages: read, prepare, store, generate.

Tornado loop only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.answers import Answer
from llmkit.gateway.conversations.detached import TurnExchange
from llmkit.gateway.conversations.fitting import fit
from llmkit.gateway.conversations.keeping import Keeping
from llmkit.gateway.conversations.log import EventLog
from llmkit.gateway.conversations.objects import message_object
from llmkit.gateway.conversations.placing import Place, append, begin, placed
from llmkit.gateway.conversations.schemas import EditBody, RegenerateBody, SendBody, TurnBody
from llmkit.gateway.conversations.settings import chat_of, merged
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.protocol import Completion, Message, ToolCall
from llmkit.protocol.client import EngineClient
from llmkit.store.conversation_records import NewMessage, StoredConversation, StoredMessage

__all__ = ["Answering"]

BODIES: dict[str, type[TurnBody]] = {
    "send": SendBody,
    "edit": EditBody,
    "regenerate": RegenerateBody,
}
QUESTION = Message("user", "")  # in place of the history, until that is fitted
KEPT = "The session is kept: name another model, or change the session's."


class Answering:
    """Answers turns with the engines of a directory. ``on_use`` is called with each in use."""

    def __init__(
        self,
        shelf: Callable[[], Shelf],
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None],
    ) -> None:
        self._shelf, self._directory, self._on_use = shelf, directory, on_use

    async def answer(self, exchange: TurnExchange) -> None:
        """Run a turn to its last token; how it ended is in its `Keeping`."""
        turn, wish, owner = exchange.turn, exchange.wish, exchange.identity.name
        body = await exchange.read(BODIES[wish.kind])
        turn.is_streamed = body.stream
        shelf = self._shelf()
        attached = Attached(None)
        body.new(attached)  # to see what is attached
        await attached.read(exchange)
        known = wish.session_id or turn.id  # a new session waits for no other
        place = await shelf.call(
            owner, lambda store: placed(store, owner, wish, body, attached), known
        )
        if isinstance(body, SendBody | EditBody) and not body.reply:
            await self._append(exchange, place, known)
            return
        engine = await self._engine(exchange, body, place.session)
        stored = {} if place.session is None else place.session.settings
        settings = merged(stored, body.settings)
        exchange.given |= frozenset(settings.model_dump(exclude_none=True))
        new = [_message(m) for m in place.new]
        chat = chat_of(settings, new or [QUESTION], engine.description)
        chat = replace(chat, media=attached.files)
        how = "drop" if place.session is None else place.session.pruning
        fitted = await fit(exchange, engine, chat, place.path, new, how)
        answer = Answer(engine, fitted.chat, new_id("turn"), exchange, self._on_use)
        try:
            # The engine computes the prompt while question and reply are stored.
            begun, cancelled = await shelf.finish(
                owner,
                lambda store: begin(store, owner, place, body.model, engine.description.name),
                known,
            )
            keeping = Keeping(shelf, owner, begun[-1], pruned=fitted.pruned)
            shown = [message_object(m) for m in begun]
            turn.begin(keeping, shown, exchange.answer_headers)
            if cancelled:
                return
            await exchange.start_events()
            if fitted.is_new:
                turn.log.add("pruned", message=fitted.pruned)
            async for update in answer.updates():
                if isinstance(update, Completion):
                    keeping.completion = update
                    keeping.start_end()  # while the last text is sent
                elif update is not None:
                    keeping.take(update)
                    _log(turn.log, update)
            await turn.settle()
        finally:
            answer.close()

    async def _append(self, exchange: TurnExchange, place: Place, known: str) -> None:
        """Store messages without having them answered."""
        turn, owner = exchange.turn, exchange.identity.name
        stored = await self._shelf().call(owner, lambda store: append(store, owner, place), known)
        turn.session_id = stored[-1].conversation_id
        turn.appended = [message_object(m) for m in stored]
        exchange.record.status = 200

    async def _engine(
        self, exchange: TurnExchange, body: TurnBody, session: StoredConversation | None
    ) -> EngineClient:
        if body.model is not None or session is None or not session.model:
            name = body.model or "default"
            if body.model is None:
                await self._admit(exchange, name)
            return self._directory.lookup(name, "generate")
        try:
            await self._admit(exchange, session.model)
            return self._directory.lookup(session.model, "generate")
        except (ModelNotFoundError, EngineGoneError) as error:
            answer = api_error(error, for_admin=ADMIN in exchange.identity.scopes)
            raise ApiError(
                answer.status, f"{answer.message} {KEPT}", answer.type, "model", answer.code,
                answer.headers,
            ) from error  # fmt: skip

    @staticmethod
    async def _admit(exchange: TurnExchange, model: str) -> None:
        assert exchange.reading is not None
        await exchange.reading.admit(exchange, model)


def _message(new: NewMessage) -> Message:
    return StoredMessage("", "", None, 0, new.role, new.content, new.reasoning, new.tool_calls,
                         new.tool_call_id, new.name).message  # fmt: skip


def _log(log: EventLog, events: list[Event]) -> None:
    for event in events:
        match event:
            case Content(text):
                log.text("delta", text)
            case Reasoning(text):
                log.text("reasoning", text)
            case Call():
                call = ToolCall(event.call_id, event.name, event.arguments).as_json()
                log.add("call", size=len(event.arguments), call=call)
