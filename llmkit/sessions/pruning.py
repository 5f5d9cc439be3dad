"""What of a long conversation is sent: its oldest turns are dropped, or told in a summary. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmkit.errors import ContextLengthError
from llmkit.protocol import INSTRUCTIONS, Message
from llmkit.store.conversation_records import Pruning

__all__ = ["Pruned", "ask_for_summary", "prune", "shortened", "turn_places", "with_summary"]

Count = Callable[[Sequence[Message]], int]
SUMMARY = "Summary of the conversation so far:"
ASK = (
    "Summarise the conversation below for somebody who goes on with it. Keep names, numbers, "
    "decisions, open questions and what the user wants. Write at most 200 words, and nothing else."
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What is sent of a conversation.

    ``messages`` are its instructions and what follows ``cut``, an index into all messages (0: all
    of them). ``dropped`` are the messages that this pruning left out beyond ``since``. The messages
    have ``num_tokens``.
    """

    messages: tuple[Message, ...]
    dropped: tuple[Message, ...]
    cut: int
    num_tokens: int


def prune(
    messages: Sequence[Message],
    count: Count,
    limit: int,
    how: Pruning = "drop",
    *,
    since: int = 0,
    target: int | None = None,
) -> Pruned:
    """At most ``limit`` tokens of a conversation, by ``count``.

    Turns are dropped from the oldest until ``target`` tokens remain (three quarters of the limit),
    so that the turns to come find their beginning computed. Instructions and the newest turn stay,
    and no call is parted from its result. ``since`` is the ``cut`` of an earlier pruning, which is
    kept. Counts a logarithmic number of times.

    Raises `ContextLengthError` where that is still too long, or if ``how`` is "stop".

    >>> talk = [Message("system", "s"), *[Message(r, "x") for r in ["user", "assistant"] * 5]]
    >>> pruned = prune(talk, len, 8)
    >>> len(pruned.messages), pruned.cut, len(pruned.dropped)
    (5, 7, 6)
    """
    places = turn_places(messages)
    start = since if since in places else 0
    num_tokens = _size(count, _kept(messages, start))
    if num_tokens <= limit:
        return Pruned(_kept(messages, start), (), start, int(num_tokens))
    if how == "stop":
        raise _too_long(num_tokens, limit)
    wanted = limit * 3 // 4 if target is None else min(target, limit)
    later = [place for place in places if place > start]
    low, high = 0, len(later) - 1  # the first place after which little enough remains, or the last
    while low < high:
        middle = (low + high) // 2
        if _size(count, _kept(messages, later[middle])) <= wanted:
            high = middle
        else:
            low = middle + 1
    cut = later[low] if later else start
    kept = _kept(messages, cut)
    num_tokens = _size(count, kept)
    if num_tokens > limit:
        raise _too_long(num_tokens, limit)
    dropped = tuple(m for m in messages[start:cut] if m.role not in INSTRUCTIONS)
    return Pruned(kept, dropped, cut, int(num_tokens))


def shortened(messages: Sequence[Message], count: Count, limit: int) -> tuple[Message, ...]:
    """Without the oldest turns, so that ``limit`` tokens remain, or only the newest turn."""
    try:
        return prune(messages, count, limit, target=limit).messages
    except ContextLengthError:
        return _kept(messages, max(turn_places(messages), default=0))


def turn_places(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: at a question, but not between a call and its result. Linear.

    The first turn does not count, since nothing is before it.

    >>> turn_places([Message(role, "") for role in ("system", "user", "assistant", "user")])
    [3]
    """
    calls: dict[str, int] = {}
    latest: int | None = None  # where the newest calls are, for results without an id
    reach: dict[int, int] = {}  # from the place of calls to that of their last result
    for i, message in enumerate(messages):
        if message.tool_calls:
            latest = i
            calls.update((call.call_id, i) for call in message.tool_calls if call.call_id)
        if message.role == "tool":
            place = calls.get(message.tool_call_id or "", latest)
            if place is not None:
                reach[place] = i
    places, held, asked = [], -1, False
    for i, message in enumerate(messages):
        begins = message.role == "user" and (i == 0 or messages[i - 1].role != "user")
        if begins and asked and i > held:
            places.append(i)
        asked = asked or message.role not in INSTRUCTIONS
        held = max(held, reach.get(i, -1))
    return places


def ask_for_summary(
    dropped: Sequence[Message], count: Count, limit: int, before: str = ""
) -> list[Message]:
    """What to ask a model for a summary of dropped messages, after an earlier summary.

    At most ``limit`` tokens: of what is too long, the older part is left out.
    """
    told = [f"{SUMMARY} {before}"] if before else []
    for message in dropped:
        said = message.text
        for call in message.tool_calls:
            said += f"\n[calls {call.name} {call.arguments}]"
        told.append(f"{message.role}: {said}")
    text = "\n\n".join(told)
    while True:
        question = [Message("user", f"{ASK}\n\n---\n\n{text}")]
        if not text or _size(count, question) <= limit:
            return question
        text = text[len(text) // 4 + 1 :]


def with_summary(messages: Sequence[Message], summary: str) -> tuple[Message, ...]:
    """Pruned messages with a summary of what was dropped, in the last of their instructions."""
    told = f"{SUMMARY}\n{summary.strip()}"
    end = next((i for i, m in enumerate(messages) if m.role not in INSTRUCTIONS), len(messages))
    if not end:
        return (Message("system", told), *messages)
    last = messages[end - 1]
    said = replace(last, content=f"{last.text}\n\n{told}")
    return (*messages[: end - 1], said, *messages[end:])


def _kept(messages: Sequence[Message], cut: int) -> tuple[Message, ...]:
    return (*(m for m in messages[:cut] if m.role in INSTRUCTIONS), *messages[cut:])


def _size(count: Count, messages: Sequence[Message]) -> float:
    try:
        return count(messages)
    except ContextLengthError as error:
        return max(error.num_tokens, error.n_ctx) if error.num_tokens else math.inf


def _too_long(num_tokens: float, limit: int) -> ContextLengthError:
    known = limit + 1 if math.isinf(num_tokens) else int(num_tokens)
    return ContextLengthError(known, limit, "messages")
