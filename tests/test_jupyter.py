"""The mounted gateway: Jupyter's own authentication guards every route, and errors have OpenAI's
shape."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from jupyter_client_http import JupyterServer

from llmkit.errors import InvalidRequestError
from llmkit.gateway.app import Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.web.assets import folder
from llmkit.settings.gateway import GATEWAY_OPTIONS, GatewayOptions
from llmkit_jupyter.extension import LLMKitExtension

ROUTES = {  # by path, whose shape the errors have
    re.sub(r"\{\w+\+?\}", "x", path): route.errors
    for route in Gateway(EngineDirectory()).routes
    for path in (route.path, *route.also)
}
PATHS = [*sorted(ROUTES), "/v1/unknown", "/", ""]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
OPEN = {("GET", "/assets/x"), ("HEAD", "/assets/x")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    jupyter = JupyterServer(tmp_path_factory.mktemp("jupyter"), base_url="/user/ann/")
    yield jupyter
    jupyter.stop()


def fetch(
    server: JupyterServer,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[int, Any, Any]:
    request = urllib.request.Request(
        f"{server.url}/llmkit{path}", body, headers or {}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def check_error(body: bytes, code: str | None = None) -> None:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code


def check_refusal(path: str, body: bytes) -> None:
    """In the words of the route's own clients."""
    dialect = ROUTES.get(path, "openai")
    if dialect in ("ollama", "llms"):
        assert "token" in json.loads(body)["error"]
    elif dialect in ("llama-server", "anthropic"):
        assert json.loads(body)["error"]["type"] == "authentication_error"
    else:
        check_error(body, "invalid_api_key")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_no_route_is_open(server: JupyterServer, method: str, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"x-api-key": "wrong"},
        {"Cookie": "_xsrf=1", "X-XSRFToken": "1"},
    ):
        status, body, _ = fetch(server, method, path, headers, b"{}" if method == "POST" else None)
        if (method, path) in OPEN:
            assert status == 404
            continue
        assert status == 401, (headers, body)
        if method != "HEAD":
            check_refusal(path, body)


def test_another_host_or_origin_is_refused(server: JupyterServer) -> None:
    status, body, _ = fetch(
        server,
        "GET",
        "/v1/models",
        {"Authorization": f"Bearer {server.token}", "Host": "evil.example"},
    )
    assert status == 403
    check_error(body)
    status, _, headers = fetch(
        server,
        "OPTIONS",
        "/v1/models",
        {"Origin": "http://evil.example", "Access-Control-Request-Method": "GET"},
    )
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("how", ["bearer", "token", "x-api-key"])
def test_the_token_opens_it(server: JupyterServer, how: str) -> None:
    header = {
        "bearer": {"Authorization": f"Bearer {server.token}"},
        "token": {"Authorization": f"token {server.token}"},
        "x-api-key": {"x-api-key": server.token},
    }
    status, body, headers = fetch(server, "GET", "/v1/models", header[how])
    assert (
        status == 200
        and json.loads(body) == {"models": [], "object": "list", "data": []}
        and headers["x-request-id"]
    )


def test_requests_have_deadlines_here_too(server: JupyterServer) -> None:
    auth = {"Authorization": f"Bearer {server.token}"}
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for timeout, headers, status, code in [
        (60, {}, 503, "model_unavailable"),
        ("soon", {}, 400, None),
        (5, {"x-request-timeout": "soon"}, 400, None),
    ]:
        data = json.dumps({**body, "timeout": timeout}).encode()
        got, reply, _ = fetch(server, "POST", "/v1/chat/completions", {**auth, **headers}, data)
        assert got == status, reply
        check_error(reply, code)


def test_errors_have_openais_shape(server: JupyterServer) -> None:
    auth = {"Authorization": f"Bearer {server.token}"}
    for method, path, status, code in [
        ("GET", "/v1/unknown", 404, "not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/x", 404, "model_not_found"),
        ("GET", "/health", 503, "model_unavailable"),
        ("POST", "/v1/chat/completions", 400, None),
    ]:
        got, body, _ = fetch(server, method, path, auth, b"{" if method == "POST" else None)
        assert got == status, body
        check_error(body, code)


def test_the_extension_is_enabled_by_installing_and_says_where(server: JupyterServer) -> None:
    assert "llmkit gateway at http" in server.output() and "/user/ann/llmkit/v1" in server.output()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("max_queue", 0), ("request_timeout_s", -1.0), ("default_model", ""), ("otlp_endpoint", "x")],
)
def test_what_is_no_option_is_an_error(name: str, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} must be"):
        LLMKitExtension(**{name: wrong})._options()


def test_options_are_those_of_the_table() -> None:
    assert LLMKitExtension()._options() == GatewayOptions()
    trait = LLMKitExtension.class_own_traits(config=True)["max_queue"]
    assert trait.help == GATEWAY_OPTIONS["max_queue"].help


def test_pages_are_pages(server: JupyterServer) -> None:
    auth = {"Authorization": f"Bearer {server.token}"}
    for path, kind in (
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/status?part=1", "text/html"),
        ("/status", "application/json"),
    ):
        status, _, headers = fetch(server, "GET", path, auth)
        assert status == 200 and headers["Content-Type"].startswith(kind), path


def test_a_person_is_sent_to_the_login_and_back(server: JupyterServer) -> None:
    for path in ("/", "/chat?model=x"):
        status, body, _ = fetch(server, "GET", path, {"Accept": "text/html,*/*;q=0.8"})
        back = quote(f"/user/ann/llmkit{path}", safe="")
        assert status == 200 and f"/user/ann/login?next={back}".encode() in body
    assert fetch(server, "POST", "/v1/tokenize", {"Accept": "text/html"}, b"{}")[0] in (401, 403)


def test_everybody_may_have_the_pages_files(server: JupyterServer) -> None:
    """A browser asks for modules without what Jupyter or a hub knows a user by."""
    status, body, headers = fetch(server, "GET", f"/{folder()}/main.js")
    assert status == 200 and b"import" in body
    assert headers["Content-Type"] == "text/javascript; charset=utf-8"
