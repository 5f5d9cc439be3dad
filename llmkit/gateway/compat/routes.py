"""The table of this room's routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.compat.generating import GenerateEventsBody, GeneratingRoutes
from llmkit.gateway.compat.llama_schemas import (
    InfillBody,
    LlamaCompletionBody,
    LlamaEmbeddingBody,
)
from llmkit.gateway.compat.llama_server import LlamaServerRoutes
from llmkit.gateway.compat.llama_state import LlamaStateRoutes
from llmkit.gateway.compat.llama_words import understanding
from llmkit.gateway.compat.llms import (
    Llms,
    LlmsChatBody,
    LlmsCompletionBody,
    LlmsGenerateBody,
)
from llmkit.gateway.compat.unprefixed import (
    PlainCompletionRequest,
    PromptedChatBody,
    UnprefixedRoutes,
)
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.gateway.openai.routes import OpenAIRoutes
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.protocol.client import EngineClient

__all__ = ["compat_routes"]

LLAMA, OTHERS = "llama-server", "Compatible"
MODEL = (Query("model", "Its name; by default the newest."),)
Run = Callable[[Exchange], Awaitable[None]]


def compat_routes(
    directory: EngineDirectory,
    on_use: Callable[[EngineClient], None],
    openai: OpenAIRoutes,
    llms: Llms,
    state: LlamaStateRoutes,
    *,
    loads_models: bool = False,
) -> list[Route]:
    """All of them, but those whose paths other dialects have too.

    A gateway that ``loads_models`` itself has the routes for that, see `LifecycleRoutes`.
    """
    server = LlamaServerRoutes(directory, on_use)
    chat = understanding(openai.chat_completions)
    plain = UnprefixedRoutes(directory, on_use, openai, chat, server.completion)
    own = GeneratingRoutes(directory, on_use, openai.get_model)
    return [
        *([] if loads_models else _loading_nothing(own)),
        *_llama_server(server, state),
        *_unprefixed(plain),
        *(replace(route, dialect="llms") for route in _llms(llms)),
        Route(
            "POST",
            "/v1/generate",
            own.generate,
            "Answer a prompt in token events",
            OTHERS,
            GenerateEventsBody,
        ),
        Route("GET", "/v1/health", own.health, "Health, queue and uptime", OTHERS),
        Route("GET", "/v1/status", own.status, "Queue and uptime", OTHERS),
        Route("GET", "/v1/model/info", own.info, "The default model", OTHERS),
        Route("GET", "/v1/models/active", own.active, "The default model", OTHERS),
    ]


def _loading_nothing(own: GeneratingRoutes) -> list[Route]:
    refuse, text = own.refuse_loading, "Not supported"
    return [
        Route("GET", "/v1/models/list", own.files, "The files that can be loaded: none", OTHERS),
        Route("POST", "/v1/models/load", refuse, text, OTHERS, also=("/models/load",)),
        Route("POST", "/v1/models/reload", refuse, text, OTHERS),
        Route("POST", "/v1/models/unload", refuse, text, OTHERS, also=("/models/unload",)),
    ]


def _unprefixed(plain: UnprefixedRoutes) -> list[Route]:
    return [
        Route(
            "POST",
            "/completions",
            plain.completions,
            "Continue a text; the answer has it as text too",
            OTHERS,
            PlainCompletionRequest,
            LlamaCompletionBody,
            or_dialect="llama-server",
        ),
        Route(
            "POST",
            "/chat/completions",
            plain.chat_completions,
            "Chat, or answer a prompt in bare events",
            OTHERS,
            ChatRequest,
            PromptedChatBody,
        ),
        Route("GET", "/models", plain.models, "The models, and their names", OTHERS),
        Route("GET", "/models/{id+}", plain.model, "A model", OTHERS),
    ]


def _llms(llms: Llms) -> list[Route]:
    return [
        Route("GET", "/api/llms", llms.models, "The models", OTHERS),
        Route(
            "POST",
            "/api/generate/stream",
            llms.stream_generate,
            "Answer a prompt in events",
            OTHERS,
            LlmsGenerateBody,
        ),
        Route("POST", "/api/chat/stream", llms.stream_chat, "Chat in events", OTHERS, LlmsChatBody),
        Route(
            "POST",
            "/api/completions",
            llms.complete,
            "Continue a text",
            OTHERS,
            LlmsCompletionBody,
        ),
        Route(
            "POST",
            "/api/completions/stream",
            llms.stream_complete,
            "Continue a text in events",
            OTHERS,
            LlmsCompletionBody,
        ),
    ]


def _llama_server(server: LlamaServerRoutes, state: LlamaStateRoutes) -> list[Route]:
    return [
        Route(
            "POST",
            "/completion",
            server.completion,
            "Continue a text",
            LLAMA,
            LlamaCompletionBody,
        ),
        Route("POST", "/infill", server.infill, "Fill in code", LLAMA, InfillBody),
        Route(
            "POST",
            "/embedding",
            server.embedding,
            "Vectors of texts",
            LLAMA,
            LlamaEmbeddingBody,
            also=("/embeddings",),
        ),
        Route("GET", "/props", state.props, "The model and its template", LLAMA, query=MODEL),
        Route("POST", "/props", state.set_props, "Not supported", LLAMA),
        Route(
            "GET",
            "/slots",
            state.slots,
            "What the slots do",
            LLAMA,
            query=(*MODEL, Query("fail_on_no_slot", "With a value: 503 if all of them compute.")),
        ),
        Route("POST", "/slots/{id_slot}", state.act_on_slot, "Not supported", LLAMA),
        Route("GET", "/lora-adapters", state.adapters, "The adapters", LLAMA, query=MODEL),
        Route(
            "POST",
            "/lora-adapters",
            state.set_adapters,
            "Scale the adapters of requests that name none",
            LLAMA,
            scope=ADMIN,
            query=MODEL,
        ),
    ]
