"""What llama-server says about itself: /props, /slots, /lora-adapters, and its list of models.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.adapters import Adapters
from llmkit.gateway.bodies import check_counts, parse_json, validated
from llmkit.gateway.compat import llama_objects as objects
from llmkit.gateway.compat.llama_schemas import LoraScale, adapter_names, scales_of
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError, not_supported
from llmkit.gateway.ids import new_id
from llmkit.protocol import (
    DescribeVocabulary,
    Inquiry,
    ListSlots,
    ModelDescription,
    SamplingParams,
)
from llmkit.protocol.client import EngineClient
from llmkit.version import __version__

__all__ = ["LlamaStateRoutes", "with_models"]


class LlamaStateRoutes:
    """Routes over the engines of a directory; a query ``model`` names one."""

    def __init__(
        self, directory: EngineDirectory, adapters: Adapters, *, has_metrics: bool = False
    ) -> None:
        self._directory, self._adapters, self._has_metrics = directory, adapters, has_metrics

    async def props(self, exchange: Exchange) -> None:
        engine = self._engine(exchange)
        model = engine.description
        inquiry = Inquiry(new_id("props"), DescribeVocabulary(), exchange.caller)
        vocabulary = await asyncio.wrap_future(engine.inquire(inquiry))
        _send(
            exchange,
            {
                "default_generation_settings": {
                    "params": objects.settings(SamplingParams(max_tokens=None)),
                    "n_ctx": model.n_ctx,
                },
                "total_slots": model.n_slots,
                "model_alias": model.name,
                "model_ftype": model.quantization,
                "model_path": exchange.shown_path(model.path),
                "modalities": {
                    "vision": "image" in model.senses,
                    "video": False,
                    "audio": "audio" in model.senses,
                },
                "media_marker": "<__media__>",
                "endpoint_slots": True,
                "endpoint_props": False,
                "endpoint_metrics": self._has_metrics,
                "ui": False,
                "ui_settings": {},
                "chat_template": vocabulary.chat_template or "",
                "chat_template_caps": _template_caps(model),
                "bos_token": vocabulary.bos_token,
                "eos_token": vocabulary.eos_token,
                "build_info": f"llmkit-{__version__}",
                "is_sleeping": False,
                "cors_proxy_enabled": False,
            },
        )

    async def set_props(self, exchange: Exchange) -> None:
        raise not_supported("This server does not support changing global properties.")

    async def slots(self, exchange: Exchange) -> None:
        engine = self._engine(exchange)
        inquiry = Inquiry(new_id("slots"), ListSlots(), exchange.caller)
        try:
            slots = await asyncio.wrap_future(engine.inquire(inquiry))
        except InvalidRequestError:  # an embedding model has none
            slots = ()
        busy = {slot.slot for slot in slots if slot.request is not None}
        # Lengths tell whose prompts are like one's own.
        is_admin = ADMIN in exchange.identity.scopes
        held = {slot.slot: slot.tokens for slot in slots if is_admin}
        number = max(engine.description.n_slots, len(slots))
        if exchange.query("fail_on_no_slot") and len(busy) >= number:
            raise ApiError(503, "no slot available", "unavailable_error")
        made = [
            {
                "id": i,
                "n_ctx": engine.description.n_ctx,
                "speculative": False,
                "is_processing": i in busy,
                "n_prompt_tokens": held.get(i, 0),
            }
            for i in range(number)
        ]
        _send(exchange, made)

    async def act_on_slot(self, exchange: Exchange) -> None:
        raise not_supported("This server does not support slots action.")

    async def adapters(self, exchange: Exchange) -> None:
        engine = self._engine(exchange)
        model, chosen = engine.description, self._adapters.of(engine)
        scales = None if chosen is None else dict(chosen)
        made = [
            {
                "id": i,
                "path": exchange.shown_path(path),
                "scale": scale if scales is None else scales.get(name, 0.0),
                "task_name": "",
                "prompt_prefix": "",
            }
            for i, ((path, scale), name) in enumerate(
                zip(model.adapters, adapter_names(model), strict=True)
            )
        ]
        _send(exchange, made)

    async def set_adapters(self, exchange: Exchange) -> None:
        """From now on; an adapter that is not named is off."""
        engine = self._engine(exchange)
        scales = [validated(LoraScale, each) for each in _list(exchange.body)]
        self._adapters.set(engine, scales_of(scales, engine.description))
        _send(exchange, {"success": True})

    def _engine(self, exchange: Exchange) -> EngineClient:
        return self._directory.lookup(exchange.query("model") or "default")


def with_models(listing: Callable[[], dict[str, Any]]) -> Callable[[Exchange], Awaitable[None]]:
    """A route for OpenAI's list of models that also has llama-server's fields."""

    async def answer(exchange: Exchange) -> None:
        listed = listing()
        data = [{**each, "aliases": [each["id"]], "tags": []} for each in listed["data"]]
        models = [_entry(each) for each in data]
        exchange.send_json({"models": models, **listed, "data": data})

    return answer


def _entry(model: dict[str, Any]) -> dict[str, Any]:
    """llama-server lists "completion" for every model, whatever it does. So do we, but for one
    that is known to draw."""
    modalities: dict[str, list[str]] = model.get("architecture", {})
    writes = modalities.get("output_modalities", ["text"]) == ["text"]
    return objects.listed(model["id"], modalities.get("input_modalities", ()) if writes else None)


def _list(body: bytes) -> list[dict[str, Any]]:
    """A body that is a list of objects. Raises `InvalidRequestError`."""
    check_counts(body)
    data = parse_json(b'{"list": %b}' % body)
    entries = data["list"]
    if len(data) > 1 or not isinstance(entries, list):
        raise InvalidRequestError("The body must be a list.")
    if not all(isinstance(entry, dict) for entry in entries):
        raise InvalidRequestError("The body must be a list of objects.")
    return entries


def _template_caps(model: ModelDescription) -> dict[str, bool]:
    """What messages may hold: whatever the template lacks is put into words."""
    return {
        "supports_object_arguments": True,
        "supports_parallel_tool_calls": True,
        "supports_preserve_reasoning": bool(model.reasoning),
        "supports_reasoning_effort": bool(model.reasoning),
        "supports_string_content": True,
        "supports_system_role": True,
        "supports_tool_calls": True,
        "supports_tools": True,
        "supports_typed_content": False,
    }


def _send(exchange: Exchange, value: Any) -> None:
    exchange.send_bytes(objects.compact(value).encode())
