"""A model's answer as Anthropic's content blocks, whole or as stream events. Pure."""

from __future__ import annotations

import json
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning

__all__ = ["BlockStream", "content_blocks"]

Block = dict[str, Any]


def content_blocks(events: list[Event]) -> list[Block]:
    """A whole answer as content blocks."""
    blocks: list[Block] = []
    for event in events:
        match event:
            case Content():
                if blocks and blocks[-1]["type"] == "text":
                    blocks[-1]["text"] += event.text
                else:
                    blocks.append({"type": "text", "text": event.text})
            case Reasoning():
                if blocks and blocks[-1]["type"] == "thinking":
                    blocks[-1]["thinking"] += event.text
                else:
                    blocks.append({"type": "thinking", "thinking": event.text, "signature": ""})
            case Call():
                blocks.append(_tool_use(event, json.loads(event.arguments)))
    return blocks


class BlockStream:
    """Turns parser events into stream events. Consecutive events of a kind form one block."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def events(self, entries: list[Event]) -> list[dict[str, Any]]:
        """The stream events for further parser events."""
        result: list[dict[str, Any]] = []
        for entry in entries:
            match entry:
                case Content():
                    result += self._begin("text", {"type": "text", "text": ""})
                    result.append(self._delta({"type": "text_delta", "text": entry.text}))
                case Reasoning():
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    result += self._begin("thinking", block)
                    result.append(self._delta({"type": "thinking_delta", "thinking": entry.text}))
                case Call():
                    result += self._begin(None, _tool_use(entry, {}))
                    result.append(
                        self._delta({"type": "input_json_delta", "partial_json": entry.arguments})
                    )
        return result

    def _begin(self, kind: str | None, block: Block) -> list[dict[str, Any]]:
        """Open a block, unless one of its kind is open; with None, open one in any case."""
        if kind is not None and self._open == kind:
            return []
        closing = self.close()
        self._index += 1
        self._open = kind or "tool_use"
        return [
            *closing,
            {"type": "content_block_start", "index": self._index, "content_block": block},
        ]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def close(self) -> list[dict[str, Any]]:
        """Close the open block."""
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]


def _tool_use(call: Call, arguments: dict[str, Any]) -> Block:
    call_id = call.call_id.replace("call_", "toolu_")
    return {"type": "tool_use", "id": call_id, "name": call.name, "input": arguments}
