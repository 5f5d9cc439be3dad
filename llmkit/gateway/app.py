"""The gateway: one table of routes, run by two adapters. Here the table, its dispatcher and the plain Tornado adapter; Jupyter's is in `jupyter_ext`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from tornado import httpserver, web

from llmkit.client import EngineClient
from llmkit.gateway.anthropic import AnthropicRoutes, CountBody, MessagesBody
from llmkit.gateway.auth import Keys
from llmkit.gateway.chat import ChatRequest
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import MAX_BODY_BYTES, ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.ollama import ChatBody, EmbedBody, GenerateBody, OldEmbedBody, OllamaRoutes, ShowBody
from llmkit.gateway.openai import OpenAIRoutes
from llmkit.gateway.openapi import Route, describe, page
from llmkit.gateway.responses import ResponsesBody
from llmkit.gateway.responses_routes import ResponsesRoutes
from llmkit.gateway.schemas import CompletionRequest
from llmkit.gateway.status import StatusRoutes, send_page
from llmkit.gateway.tokenizing import DetokenizeBody, TemplateBody, TokenizeBody, TokenizerRoutes
from llmkit.gateway.vectors import EmbeddingsBody, RerankBody, VectorRoutes
from llmkit.version import __version__

__all__ = ["Gateway", "make_app", "make_server"]

logger = logging.getLogger("llmkit.gateway")


class Gateway:
    """Answers an `Exchange` by the route table; every error becomes an error object. ``places`` gives notebooks by kernel id, for the page."""

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        places: Callable[[], Awaitable[dict[str, str]]] | None = None,
    ) -> None:
        self._directory = directory
        self._status = status = StatusRoutes(directory, places)
        openai = OpenAIRoutes(directory, f"llmkit-{__version__}", on_use)
        anthropic, ollama, responses = AnthropicRoutes(directory, on_use), OllamaRoutes(directory, on_use), ResponsesRoutes(directory, on_use)
        vectors, tokens = VectorRoutes(directory, on_use), TokenizerRoutes(directory)
        self.routes = [
            Route("GET", "/v1/models", openai.list_models, "The loaded models, newest first", "OpenAI"),
            Route("GET", "/v1/models/{id+}", openai.get_model, "One of them", "OpenAI"),
            Route("POST", "/v1/chat/completions", openai.chat_completions, "Chat", "OpenAI", ChatRequest),
            Route("POST", "/v1/completions", openai.completions, "Continue a text", "OpenAI", CompletionRequest),
            Route("POST", "/v1/responses", responses.create, "A response", "OpenAI", ResponsesBody),
            Route("GET", "/v1/responses/{response_id}", responses.get, "A stored response", "OpenAI"),
            Route("DELETE", "/v1/responses/{response_id}", responses.delete, "Forget a response", "OpenAI"),
            Route("POST", "/v1/responses/{response_id}/cancel", responses.cancel, "End a running response", "OpenAI"),
            Route("GET", "/v1/responses/{response_id}/input_items", responses.input_items, "What a response was asked", "OpenAI"),
            Route("POST", "/v1/embeddings", vectors.embeddings, "Vectors of texts", "OpenAI", EmbeddingsBody),
            Route("POST", "/v1/messages", anthropic.messages, "A message", "Anthropic", MessagesBody),
            Route("POST", "/v1/messages/count_tokens", anthropic.count_tokens, "Tokens of a prompt", "Anthropic", CountBody),
            Route("POST", "/api/chat", ollama.chat, "Chat", "Ollama", ChatBody),
            Route("POST", "/api/generate", ollama.generate, "Answer a prompt", "Ollama", GenerateBody),
            Route("POST", "/api/embed", ollama.embed, "Vectors of texts", "Ollama", EmbedBody),
            Route("POST", "/api/embeddings", ollama.embeddings, "The vector of a text, in the older form", "Ollama", OldEmbedBody),
            Route("POST", "/api/show", ollama.show, "What a model is", "Ollama", ShowBody),
            Route("GET", "/api/tags", ollama.tags, "The loaded models", "Ollama"),
            Route("GET", "/api/ps", ollama.ps, "The loaded models, with their sizes", "Ollama"),
            Route("GET", "/api/version", ollama.version, "The version", "Ollama"),
            Route("POST", "/v1/rerank", vectors.rerank, "Documents in the order in which they fit a query", body=RerankBody, also=("/rerank",)),
            Route("POST", "/tokenize", tokens.tokenize, "Tokens of a text or chat", body=TokenizeBody, also=("/v1/tokenize",)),
            Route("POST", "/detokenize", tokens.detokenize, "The text of tokens", body=DetokenizeBody, also=("/v1/detokenize",)),
            Route("POST", "/apply-template", tokens.apply_template, "The prompt of a chat", body=TemplateBody, also=("/v1/apply-template",)),
            Route("GET", "/tokenizer_info", tokens.tokenizer_info, "Special tokens and the chat template", also=("/v1/tokenizer_info",)),
            Route("GET", "/", status.page, "Models and requests, as a page"),
            Route("GET", "/status", status.status, "Models and requests"),
            Route("GET", "/health", self._health, "Whether a model is there"),
            Route("GET", "/openapi.json", self._openapi, "This description"),
            Route("GET", "/docs", self._docs, "This description as a page", also=("/swagger-ui",)),
        ]

    async def dispatch(self, exchange: Exchange) -> None:
        """Run the route for this request and answer it, whatever happens."""
        try:
            route = self._route(exchange)
            with self._status.watching(exchange):
                await route(exchange)
        except ClientGoneError:
            logger.info("the client of %s went away", exchange.path)
            exchange.drop()
        except Exception as error:
            answer = api_error(error)
            if answer.code == "internal_error":
                logger.exception("%s %s failed", exchange.method, exchange.path)
            exchange.send_error(answer)

    def _route(self, exchange: Exchange) -> Callable[[Exchange], Awaitable[None]]:
        allowed = []
        for route in self.routes:
            match = route.pattern.fullmatch(exchange.path)
            if match is None:
                continue
            if exchange.method == route.method or (exchange.method == "HEAD" and route.method == "GET"):
                exchange.args = tuple(unquote(a) for a in match.groups() if a is not None)
                return route.run
            allowed.append(route.method)
        if allowed:
            message = f"{exchange.method} is not allowed for {exchange.path:.200}; use {' or '.join(allowed)}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": ", ".join(allowed)})
        raise ApiError(404, f"There is no route {exchange.method} {exchange.path:.200}.", code="not_found")

    async def _health(self, exchange: Exchange) -> None:
        """200 when a model is there, else 503 with the reason."""
        self._directory.lookup("default")
        exchange.send_json({"status": "ok"})

    async def _openapi(self, exchange: Exchange) -> None:
        exchange.send_json(self._description)

    async def _docs(self, exchange: Exchange) -> None:
        exchange.send_page(self._description_page)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return describe(self.routes)

    @cached_property
    def _description_page(self) -> str:
        return page(self.routes)


@web.stream_request_body
class GatewayHandler(web.RequestHandler):
    """The plain Tornado adapter, with the gateway's own keys: they are checked before a body is read."""

    def initialize(self, gateway: Gateway, keys: Keys) -> None:
        self._gateway, self._keys = gateway, keys
        self._task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []

    def prepare(self) -> None:
        exchange = Exchange(self, self.path_args[0])
        refusal = self._keys.refusal(exchange.path, self.request.headers, self.request.host_name)
        if refusal is not None and refusal.status == 401 and exchange.path == "/" and exchange.wants_page:
            send_page(exchange, None)
        elif refusal is not None:
            exchange.send_error(refusal)

    def data_received(self, chunk: bytes) -> None:
        self._body.append(chunk)

    async def _run(self, path: str) -> None:
        self.request.body = b"".join(self._body)
        self._task = asyncio.ensure_future(self._gateway.dispatch(Exchange(self, path)))
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    get = post = put = delete = patch = head = options = _run

    def on_connection_close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def check_xsrf_cookie(self) -> None:
        """There are no cookies here."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")

    def write_error(self, status_code: int, **kwargs: object) -> None:
        Exchange(self, self.request.path).send_error(ApiError(status_code, self._reason, "server_error" if status_code >= 500 else "invalid_request_error"))


def make_app(gateway: Gateway, keys: Keys) -> web.Application:
    return web.Application([(r"/(.*)", GatewayHandler, {"gateway": gateway, "keys": keys})], log_function=_log)


def make_server(app: web.Application) -> httpserver.HTTPServer:
    return httpserver.HTTPServer(app, max_body_size=2 * MAX_BODY_BYTES, idle_connection_timeout=300, body_timeout=60)


def _log(handler: web.RequestHandler) -> None:
    logger.info("%d %s %.200s %.1fms", handler.get_status(), handler.request.method, handler.request.path, 1000 * handler.request.request_time())
