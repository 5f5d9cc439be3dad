"""The gateway: one table of routes, run by two adapters. Here the table, its dispatcher and the plain Tornado adapter; Jupyter's is in `jupyter_ext`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tornado import web

from llmkit.client import EngineClient
from llmkit.gateway.anthropic import AnthropicRoutes, CountBody, MessagesBody
from llmkit.gateway.auth import LOCAL, Keys
from llmkit.gateway.chat import ChatRequest
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import MAX_BODY_BYTES, ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.held import Held
from llmkit.gateway.ollama import ChatBody, EmbedBody, GenerateBody, OldEmbedBody, OllamaRoutes, ShowBody
from llmkit.gateway.openai import OpenAIRoutes
from llmkit.gateway.openapi import Route, describe, page
from llmkit.gateway.reading import Reading
from llmkit.gateway.responses import ResponsesBody
from llmkit.gateway.responses_routes import ResponsesRoutes
from llmkit.gateway.schemas import CompletionRequest
from llmkit.gateway.server import MAX_CONNECTIONS, BoundedServer
from llmkit.gateway.status import StatusRoutes, send_page
from llmkit.gateway.tokenizing import DetokenizeBody, TemplateBody, TokenizeBody, TokenizerRoutes
from llmkit.gateway.tolerance import Tolerance
from llmkit.gateway.vectors import EmbeddingsBody, RerankBody, VectorRoutes
from llmkit.lanes import Lanes
from llmkit.version import __version__

__all__ = ["Gateway", "make_app", "make_server"]

logger = logging.getLogger("llmkit.gateway")

NOTE_S = 1.0


class Gateway:
    """Answers an `Exchange` by the route table; every error becomes an error object. ``places`` gives notebooks by kernel id, for the page. ``strict`` refuses
    fields that would otherwise be accepted and ignored, see `Tolerance`. ``draining``: running requests finish, new ones are refused."""

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None] = lambda _: None,
        places: Callable[[], Awaitable[dict[str, str]]] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        self._directory = directory
        self.held = Held()
        self.draining = False
        self._lanes = Lanes(2, "llmkit-gateway")
        self._tolerance = Tolerance(strict)
        self._status = status = StatusRoutes(directory, places)
        on_use = _seldom(on_use)
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
        size = 0
        try:
            route = self._route(exchange)
            if self.draining and exchange.method == "POST":
                raise ApiError(503, "This server is shutting down; send the request again.", "server_error", code="shutting_down", headers={"Retry-After": "5"})
            self.held.add(exchange.caller, len(exchange.body), body=len(exchange.body))
            size = len(exchange.body)
            exchange.reading = Reading(self._lanes, self._tolerance)
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
        finally:
            self.held.add(exchange.caller, -size)

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return self._status.num_running

    def _route(self, exchange: Exchange) -> Callable[[Exchange], Awaitable[None]]:
        allowed = []
        for route in self.routes:
            match = route.pattern.fullmatch(exchange.path)
            if match is None:
                continue
            if exchange.method == route.method or (exchange.method == "HEAD" and route.method == "GET"):
                exchange.args = tuple(a for a in match.groups() if a is not None)  # Tornado has unquoted the path already
                return route.run
            allowed.append(route.method)
        if allowed:
            if exchange.method == "OPTIONS":
                return self._options(", ".join([*allowed, "OPTIONS"]))
            message = f"{exchange.method} is not allowed for {exchange.path:.200}; use {' or '.join(allowed)}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": ", ".join(allowed)})
        raise ApiError(404, f"There is no route {exchange.method} {exchange.path:.200}.", code="not_found")

    @staticmethod
    def _options(methods: str) -> Callable[[Exchange], Awaitable[None]]:
        async def answer(exchange: Exchange) -> None:
            exchange.send_bytes(b"", 204, {"Allow": methods})

        return answer

    def methods(self, path: str) -> str:
        """What may be done with a path, for CORS preflight."""
        return ", ".join([*(r.method for r in self.routes if r.pattern.fullmatch(path)), "OPTIONS"])

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


def _seldom(on_use: Callable[[EngineClient], None]) -> Callable[[EngineClient], None]:
    """Say at most once a second that an engine is used: a stream may say so for each token."""
    said: WeakKeyDictionary[EngineClient, float] = WeakKeyDictionary()

    def note(engine: EngineClient) -> None:
        now = time.monotonic()
        if now - said.get(engine, -math.inf) >= NOTE_S:
            said[engine] = now
            on_use(engine)

    return note


@web.stream_request_body
class GatewayHandler(web.RequestHandler):
    """The plain Tornado adapter, with the gateway's own keys: they are checked before a body is read."""

    def initialize(self, gateway: Gateway, keys: Keys) -> None:
        self._gateway, self._keys = gateway, keys
        self._task: asyncio.Task[None] | None = None
        self._body: list[bytes] = []
        self._identity = LOCAL
        self._size = 0  # bytes of the body that count as held

    def prepare(self) -> None:
        exchange = Exchange(self, self.path_args[0])
        headers = self.request.headers
        for name, value in self._keys.cors(headers).items():
            self.set_header(name, value)
        if self.request.method == "OPTIONS" and "Access-Control-Request-Method" in headers:
            answer = self._keys.preflight(headers, self._gateway.methods(exchange.path)) if is_ours(self._keys, self.request.host_name) else None
            if answer is not None:
                exchange.send_bytes(b"", 204, answer)
                return
        refusal = self._keys.refusal(exchange.path, headers, self.request.host_name)
        if refusal is not None and refusal.status == 401 and exchange.path == "/" and exchange.wants_page:
            send_page(exchange, None)
        elif refusal is not None:
            self._refuse(refusal)
        else:
            self._identity = self._keys.identify(headers)
            announced = headers.get("Content-Length", "0")
            if announced.isdecimal() and (len(announced) > 18 or int(announced) > MAX_BODY_BYTES):
                self._refuse(too_large(announced))

    def _refuse(self, error: ApiError) -> None:
        """Answer before the body is read; the rest is discarded."""
        if self.request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.request.headers:
            self.set_header("Connection", "close")
        Exchange(self, self.path_args[0]).send_error(error)

    def data_received(self, chunk: bytes) -> None:
        if self._finished:
            return
        if self._size + len(chunk) > MAX_BODY_BYTES:
            self._body.clear()
            self._refuse(too_large(str(self._size + len(chunk))))
            return
        try:
            self._gateway.held.add(self._identity.name, len(chunk), body=self._size + len(chunk))
        except ApiError as error:
            self._body.clear()
            self._refuse(error)
            return
        self._size += len(chunk)
        self._body.append(chunk)

    async def _run(self, path: str) -> None:
        self.request.body = b"".join(self._body)
        self._body.clear()
        self._let_go()  # counted by the gateway from here on
        self._task = asyncio.ensure_future(self._gateway.dispatch(Exchange(self, path, self._identity, self._gateway.held)))
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _let_go(self) -> None:
        size, self._size = self._size, 0
        self._gateway.held.add(self._identity.name, -size)

    def on_finish(self) -> None:
        self._let_go()

    get = post = put = delete = patch = head = options = _run

    def on_connection_close(self) -> None:
        self._let_go()
        if self._task is not None:
            self._task.cancel()

    def check_xsrf_cookie(self) -> None:
        """There are no cookies here."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "llmkit")

    def write_error(self, status_code: int, **kwargs: object) -> None:
        Exchange(self, self.request.path).send_error(ApiError(status_code, self._reason, "server_error" if status_code >= 500 else "invalid_request_error"))


def is_ours(keys: Keys, host: str) -> bool:
    """Whether a preflight request (it carries no key) may be answered under this host name."""
    return keys.refusal("/health", {}, host) is None


def too_large(size: str) -> ApiError:
    return ApiError(413, f"The body has {size:.20} bytes; at most {MAX_BODY_BYTES} are accepted.", code="request_too_large")


def make_app(gateway: Gateway, keys: Keys) -> web.Application:
    return web.Application([(r"/(.*)", GatewayHandler, {"gateway": gateway, "keys": keys})], log_function=_log)


def make_server(app: web.Application, most: int = MAX_CONNECTIONS) -> BoundedServer:
    """``most`` connections at a time, see `BoundedServer`. Bodies are bounded by the handler, which can say so."""
    return BoundedServer(app, most=most, max_body_size=1 << 60)


def _log(handler: web.RequestHandler) -> None:
    logger.info("%d %s %.200s %.1fms", handler.get_status(), handler.request.method, handler.request.path, 1000 * handler.request.request_time())
