"""A model's answer as the output items and stream events of OpenAI's responses. Pure."""

from __future__ import annotations

import json
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Event, Reasoning
from llmkit.gateway.ids import new_id
from llmkit.protocol import Completion

__all__ = ["EventStream", "output_items"]

Item = dict[str, Any]
StreamEvent = dict[str, Any]


def output_items(events: list[Event], completion: Completion) -> list[Item]:
    """A whole answer as items; the last one is incomplete if the text was cut off."""
    stream = EventStream()
    stream.take(events)
    stream.close("incomplete" if completion.is_cut else "completed")
    return stream.items


class EventStream:
    """Turns parser events into stream events. Consecutive events of a kind form one item.

    ``items`` are the finished ones.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: Item | None = None
        self._text = ""

    def take(self, events: list[Event]) -> list[StreamEvent]:
        """The stream events for further parser events."""
        result: list[StreamEvent] = []
        for event in events:
            match event:
                case Content():
                    result += self._begin("message", "msg", role="assistant", content=[])
                    self._text += event.text
                    result.append(
                        self._event(
                            "response.output_text.delta",
                            content_index=0,
                            delta=event.text,
                            logprobs=[],
                        )
                    )
                case Reasoning():
                    result += self._begin("reasoning", "rs", summary=[], content=[])
                    self._text += event.text
                    result.append(
                        self._event(
                            "response.reasoning_text.delta", content_index=0, delta=event.text
                        )
                    )
                case Call():
                    result += self._call(event)
        return result

    def _call(self, call: Call) -> list[StreamEvent]:
        kind, arguments = "function_call", call.arguments
        result = self._begin(kind, "fc", call_id=call.call_id, name=call.name, arguments="")
        result.append(self._event("response.function_call_arguments.delta", delta=arguments))
        result.append(
            self._event(
                "response.function_call_arguments.done", arguments=arguments, name=call.name
            )
        )
        self._text = arguments
        return [*result, *self.close()]

    def _part(self, text: str) -> Item:
        assert self._open is not None
        if self._open["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": text}

    def _begin(self, kind: str, prefix: str, **fields: Any) -> list[StreamEvent]:
        """Open an item, unless one of its kind is open."""
        if self._open is not None and self._open["type"] == kind:
            return []
        result = self.close()
        item = {"id": new_id(prefix, "_"), "type": kind, "status": "in_progress", **fields}
        self._open, self._text = item, ""
        result.append(
            {
                "type": "response.output_item.added",
                "output_index": len(self.items),
                "item": json.loads(json.dumps(item)),
            }
        )
        if kind != "function_call":
            result.append(
                self._event("response.content_part.added", content_index=0, part=self._part(""))
            )
        return result

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        """An event about the open item."""
        assert self._open is not None
        return {
            "type": kind,
            "item_id": self._open["id"],
            "output_index": len(self.items),
            **fields,
        }

    def close(self, status: str = "completed") -> list[StreamEvent]:
        """Finish the open item."""
        item = self._open
        if item is None:
            return []
        result: list[StreamEvent] = []
        if item["type"] == "function_call":
            item["arguments"] = self._text
        else:
            part = self._part(self._text)
            result.append(
                self._event(
                    "response.output_text.done", content_index=0, text=self._text, logprobs=[]
                )
                if item["type"] == "message"
                else self._event("response.reasoning_text.done", content_index=0, text=self._text)
            )
            result.append(self._event("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
        item["status"] = status
        result.append(
            {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        )
        self.items.append(item)
        self._open = None
        return result
