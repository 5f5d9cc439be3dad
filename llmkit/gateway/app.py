"""The gateway: one table of routes, run by two adapters. Here the table, its dispatcher and the plain Tornado adapter; Jupyter's is in `jupyter_ext`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from tornado import httpserver, web

from llmkit.client import EngineClient
from llmkit.gateway.anthropic import AnthropicRoutes
from llmkit.gateway.auth import Keys
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import MAX_BODY_BYTES, ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.gateway.ollama import OllamaRoutes
from llmkit.gateway.openai import OpenAIRoutes
from llmkit.gateway.responses_routes import ResponsesRoutes
from llmkit.gateway.tokenizing import TokenizerRoutes
from llmkit.gateway.vectors import VectorRoutes
from llmkit.version import __version__

__all__ = ["Gateway", "make_app", "make_server"]

logger = logging.getLogger("llmkit.gateway")

Route = Callable[[Exchange], Awaitable[None]]


class Gateway:
    """Answers an `Exchange` by the route table; every error becomes an error object."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None] = lambda _: None) -> None:
        self._directory = directory
        openai = OpenAIRoutes(directory, f"llmkit-{__version__}", on_use)
        anthropic, ollama = AnthropicRoutes(directory, on_use), OllamaRoutes(directory, on_use)
        responses = ResponsesRoutes(directory, on_use)
        vectors, tokenizer = VectorRoutes(directory, on_use), TokenizerRoutes(directory)
        self.routes: list[tuple[str, re.Pattern[str], Route]] = [
            ("GET", re.compile(r"/health"), self._health),
            ("GET", re.compile(r"/v1/models"), openai.list_models),
            ("GET", re.compile(r"/v1/models/(.+)"), openai.get_model),
            ("POST", re.compile(r"/v1/chat/completions"), openai.chat_completions),
            ("POST", re.compile(r"/v1/completions"), openai.completions),
            ("POST", re.compile(r"/v1/responses"), responses.create),
            ("GET", re.compile(r"/v1/responses/([^/]+)"), responses.get),
            ("DELETE", re.compile(r"/v1/responses/([^/]+)"), responses.delete),
            ("POST", re.compile(r"/v1/responses/([^/]+)/cancel"), responses.cancel),
            ("GET", re.compile(r"/v1/responses/([^/]+)/input_items"), responses.input_items),
            ("POST", re.compile(r"/v1/messages"), anthropic.messages),
            ("POST", re.compile(r"/v1/messages/count_tokens"), anthropic.count_tokens),
            ("POST", re.compile(r"/api/chat"), ollama.chat),
            ("POST", re.compile(r"/api/generate"), ollama.generate),
            ("POST", re.compile(r"/api/embed"), ollama.embed),
            ("POST", re.compile(r"/api/show"), ollama.show),
            ("GET", re.compile(r"/api/tags"), ollama.tags),
            ("GET", re.compile(r"/api/ps"), ollama.ps),
            ("GET", re.compile(r"/api/version"), ollama.version),
            ("POST", re.compile(r"/v1/embeddings"), vectors.embeddings),
            ("POST", re.compile(r"(?:/v1)?/rerank"), vectors.rerank),
            ("POST", re.compile(r"(?:/v1)?/tokenize"), tokenizer.tokenize),
            ("POST", re.compile(r"(?:/v1)?/detokenize"), tokenizer.detokenize),
            ("POST", re.compile(r"(?:/v1)?/apply-template"), tokenizer.apply_template),
            ("GET", re.compile(r"(?:/v1)?/tokenizer_info"), tokenizer.tokenizer_info),
        ]

    async def dispatch(self, exchange: Exchange) -> None:
        """Run the route for this request and answer it, whatever happens."""
        try:
            await self._route(exchange)(exchange)
        except ClientGoneError:
            logger.info("the client of %s went away", exchange.path)
            exchange.drop()
        except Exception as error:
            answer = api_error(error)
            if answer.code == "internal_error":
                logger.exception("%s %s failed", exchange.method, exchange.path)
            exchange.send_error(answer)

    def _route(self, exchange: Exchange) -> Route:
        allowed = []
        for method, pattern, route in self.routes:
            match = pattern.fullmatch(exchange.path)
            if match is None:
                continue
            if exchange.method == method or (exchange.method == "HEAD" and method == "GET"):
                exchange.args = tuple(unquote(a) for a in match.groups())
                return route
            allowed.append(method)
        if allowed:
            message = f"{exchange.method} is not allowed for {exchange.path:.200}; use {' or '.join(allowed)}."
            raise ApiError(405, message, code="method_not_allowed", headers={"Allow": ", ".join(allowed)})
        raise ApiError(404, f"There is no route {exchange.method} {exchange.path:.200}.", code="not_found")

    async def _health(self, exchange: Exchange) -> None:
        """200 when a model is there, else 503 with the reason."""
        self._directory.lookup("default")
        exchange.send_json({"status": "ok"})


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
        if refusal is not None:
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
