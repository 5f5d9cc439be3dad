"""The route table: every method and path of the gateway, and what runs for it.

Composes the routes of all dialects. Tornado loop only; knows no server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from llmkit.gateway.adapters import Adapters
from llmkit.gateway.anthropic.routes import AnthropicRoutes
from llmkit.gateway.anthropic.schemas import CountBody, MessagesBody
from llmkit.gateway.compat.llama_objects import timings
from llmkit.gateway.compat.llama_state import LlamaStateRoutes, with_models
from llmkit.gateway.compat.llama_words import understanding
from llmkit.gateway.compat.llms import Llms, LlmsChatBody, LlmsGenerateBody
from llmkit.gateway.compat.routes import compat_routes
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import Dialect
from llmkit.gateway.native.engine import EngineRoutes
from llmkit.gateway.native.rerank import RerankBody, RerankRoutes
from llmkit.gateway.native.tokenizing import (
    DetokenizeBody,
    TemplateBody,
    TokenizeBody,
    TokenizerRoutes,
)
from llmkit.gateway.ollama.routes import OllamaRoutes
from llmkit.gateway.ollama.schemas import (
    ChatBody,
    EmbedBody,
    GenerateBody,
    OldEmbedBody,
    ShowBody,
)
from llmkit.gateway.openai.audio import AudioRoutes
from llmkit.gateway.openai.chat import ChatRequest
from llmkit.gateway.openai.embeddings import EmbeddingsBody, EmbeddingsRoutes
from llmkit.gateway.openai.images import ImageRoutes
from llmkit.gateway.openai.responses import ResponsesBody
from llmkit.gateway.openai.responses_routes import ResponsesRoutes
from llmkit.gateway.openai.routes import OpenAIRoutes
from llmkit.gateway.openai.schemas import CompletionRequest
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.gateway.ops.pages import PageRoutes
from llmkit.gateway.ops.status import StatusRoutes
from llmkit.protocol.client import EngineClient
from llmkit.version import __version__

__all__ = ["OwnRoutes", "route_table"]


class OwnRoutes(Protocol):
    """The routes that describe the gateway itself."""

    @property
    def openapi(self) -> Callable[[Exchange], Awaitable[None]]: ...

    @property
    def docs(self) -> Callable[[Exchange], Awaitable[None]]: ...


def route_table(
    directory: EngineDirectory,
    on_use: Callable[[EngineClient], None],
    status: StatusRoutes,
    pages: PageRoutes,
    own: OwnRoutes,
    adapters: Adapters,
    *,
    api_dialect: str = "auto",
    besides: Collection[str] = (),
    max_sound_s: float | None = None,
) -> list[Route]:
    """All routes. ``on_use`` is called whenever one uses an engine. ``api_dialect`` settles whose
    /api/generate and /api/chat are. ``besides``: the paths that a gateway has besides. Sound may
    last ``max_sound_s`` seconds."""
    openai = OpenAIRoutes(directory, f"llmkit-{__version__}", on_use, timings)
    llms = Llms(directory, on_use, api_dialect)
    shared: Dialect = "llms" if api_dialect == "llms" else "ollama"
    anthropic, ollama, responses = (
        AnthropicRoutes(directory, on_use),
        OllamaRoutes(directory, on_use),
        ResponsesRoutes(directory, on_use),
    )
    embeddings, rerank = EmbeddingsRoutes(directory, on_use), RerankRoutes(directory, on_use)
    tokens = TokenizerRoutes(directory)
    return [
        *compat_routes(
            directory,
            on_use,
            openai,
            llms,
            LlamaStateRoutes(directory, adapters, has_metrics="/metrics" in besides),
            loads_models="/v1/models/load" in besides,
        ),
        Route(
            "GET",
            "/v1/models",
            with_models(openai.listing),
            "The loaded models, newest first",
            "OpenAI",
        ),
        Route("GET", "/v1/models/{id+}", openai.get_model, "A loaded model", "OpenAI"),
        Route(
            "POST",
            "/v1/chat/completions",
            understanding(openai.chat_completions),
            "Chat",
            "OpenAI",
            ChatRequest,
        ),
        Route(
            "POST",
            "/v1/completions",
            understanding(openai.completions),
            "Continue a text",
            "OpenAI",
            CompletionRequest,
        ),
        Route("POST", "/v1/responses", responses.create, "A response", "OpenAI", ResponsesBody),
        Route("GET", "/v1/responses/{response_id}", responses.get, "A stored response", "OpenAI"),
        Route(
            "DELETE",
            "/v1/responses/{response_id}",
            responses.delete,
            "Delete a stored response",
            "OpenAI",
        ),
        Route(
            "POST",
            "/v1/responses/{response_id}/cancel",
            responses.cancel,
            "Cancel a running response",
            "OpenAI",
        ),
        Route(
            "GET",
            "/v1/responses/{response_id}/input_items",
            responses.input_items,
            "The input of a response",
            "OpenAI",
            query=(
                Query.choice("order", "Newest first unless it is asc.", "asc", "desc"),
                Query("after", "The id of the last item that is known."),
                Query.number("limit", "The most that are listed.", 100, 20),
            ),
        ),
        Route(
            "POST",
            "/v1/embeddings",
            embeddings.embeddings,
            "Vectors of texts",
            "OpenAI",
            EmbeddingsBody,
        ),
        *AudioRoutes(directory, on_use, max_sound_s).routes(),
        *ImageRoutes(directory, on_use).routes(),
        Route("POST", "/v1/messages", anthropic.messages, "A message", "Anthropic", MessagesBody),
        Route(
            "POST",
            "/v1/messages/count_tokens",
            anthropic.count_tokens,
            "Tokens of a prompt",
            "Anthropic",
            CountBody,
        ),
        Route(
            "POST",
            "/api/chat",
            llms.or_else(ollama.chat, llms.chat),
            "Chat",
            "Ollama",
            ChatBody,
            LlmsChatBody,
            dialect=shared,
            or_dialect="llms",
        ),
        Route(
            "POST",
            "/api/generate",
            llms.or_else(ollama.generate, llms.generate),
            "Answer a prompt",
            "Ollama",
            GenerateBody,
            LlmsGenerateBody,
            dialect=shared,
            or_dialect="llms",
        ),
        Route("POST", "/api/embed", ollama.embed, "Vectors of texts", "Ollama", EmbedBody),
        Route(
            "POST",
            "/api/embeddings",
            ollama.embeddings,
            "The vector of a text, in the older form",
            "Ollama",
            OldEmbedBody,
        ),
        Route("POST", "/api/show", ollama.show, "Details of a model", "Ollama", ShowBody),
        Route("GET", "/api/tags", ollama.tags, "The loaded models", "Ollama"),
        Route("GET", "/api/ps", ollama.ps, "The loaded models, with their sizes", "Ollama"),
        Route("GET", "/api/version", ollama.version, "The version", "Ollama"),
        Route(
            "POST",
            "/v1/rerank",
            rerank.rerank,
            "Documents ranked by relevance to a query",
            body=RerankBody,
            also=("/rerank", "/reranking", "/v1/reranking"),
        ),
        Route(
            "POST",
            "/tokenize",
            tokens.tokenize,
            "Tokens of a text or chat",
            body=TokenizeBody,
            also=("/v1/tokenize",),
        ),
        Route(
            "POST",
            "/detokenize",
            tokens.detokenize,
            "The text of tokens",
            body=DetokenizeBody,
            also=("/v1/detokenize",),
        ),
        Route(
            "POST",
            "/apply-template",
            tokens.apply_template,
            "The prompt of a chat",
            body=TemplateBody,
            also=("/v1/apply-template",),
        ),
        Route(
            "GET",
            "/tokenizer_info",
            tokens.tokenizer_info,
            "Special tokens and the chat template",
            also=("/v1/tokenizer_info",),
        ),
        *EngineRoutes(directory, on_use, max_sound_s=max_sound_s).routes(),
        *pages.routes(),
        Route("GET", "/status", status.status, "Models and requests"),
        Route("GET", "/openapi.json", own.openapi, "This description"),
        Route("GET", "/docs", own.docs, "This description as a page", also=("/swagger-ui",)),
    ]
