"""llmkit as the service of a real hub: one that the hub has started, and one that stands alone."""

from __future__ import annotations

import contextlib
import http.cookiejar
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hub_server import Hub, free_ports

READY_S = 120.0
CACHE_S = 2.0
# Ann, bob, eve and fay may use both services, dan is an admin of them, cat has no rights there.
CONFIG = """
c.JupyterHub.services += {services!r}
c.JupyterHub.custom_scopes = {{"custom:llmkit:admin": {{"description": "Runs llmkit"}}}}
c.JupyterHub.load_groups = {{"students": {{"users": ["bob", "eve"]}}}}
USE = {use!r}
c.JupyterHub.load_roles += [
    {{"name": "llm", "scopes": USE, "users": {users!r}, "services": ["robot"]}},
    {{"name": "llm-admin", "scopes": ["custom:llmkit:admin"], "users": ["dan"]}},
]
c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server", *USE]
c.Spawner.environment["LLMKIT_HUB_URL"] = {url!r} + "/services/llmkit/"
"""
USERS = ("ann", "bob", "cat", "dan", "eve", "fay")
ROBOT = "robot-" + "0" * 32


@dataclass(frozen=True)
class Reply:
    """What a service answered; ``json`` is the body, None if it is none."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        with contextlib.suppress(ValueError):
            return json.loads(self.body)
        return None

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def ask(method: str, url: str, body: Any = None, token: str | None = None, **headers: str) -> Reply:
    """Follows no redirect; names of headers have underscores."""
    data = None if body is None else json.dumps(body).encode()
    sent = {} if token is None else {"Authorization": f"Bearer {token}"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, sent, method=method)
    opener = urllib.request.build_opener(NoRedirect)
    try:
        with opener.open(request, timeout=60) as reply:
            return Reply(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.headers, error.read())


class HubWithModels(Hub):
    """A hub that has started the service ``llmkit`` with models and settings, and knows one called
    ``alone``, which `StandsAlone` is."""

    def __init__(self, folder: Path, models: Sequence[str], settings: str) -> None:
        self.alone_token = "alone-" + "0" * 32
        file = folder / "llmkit.toml"
        file.touch(mode=0o600)
        file.write_text(f"hub_cache_s = {CACHE_S}\n{settings}")
        environment = {
            "LLMKIT_CONFIG": str(file),
            "LLMKIT_DB_URL": f"sqlite:///{folder}/llmkit.db",
            "HOME": str(folder),
            **{name: os.environ[name] for name in ("JUPYTER_RUNTIME_DIR",) if name in os.environ},
        }
        super().__init__(folder, USERS, partial(self._config, models, environment))

    def _config(self, models: Sequence[str], environment: Mapping[str, str]) -> str:
        managed, self.alone_port = free_ports(2)
        services = [
            {
                "name": "llmkit",
                "url": f"http://127.0.0.1:{managed}",
                "command": [sys.executable, "-m", "llmkit", "hub", *models],
                "environment": dict(environment),
                "oauth_no_confirm": True,
                "oauth_client_allowed_scopes": [
                    "access:services!service=llmkit", "custom:llmkit:admin"
                ],
            },
            {
                "name": "alone",
                "url": f"http://127.0.0.1:{self.alone_port}",
                "api_token": self.alone_token,
                "oauth_no_confirm": True,
            },
            {"name": "robot", "api_token": ROBOT},
        ]  # fmt: skip
        use = [f"access:services!service={name}" for name in ("llmkit", "alone")]
        public = "c.JupyterHub.bind_url.rstrip('/')"
        config = CONFIG.format(
            services=services, use=use, users=[u for u in USERS if u != "cat"], url="{url}"
        )
        return config.replace("'{url}'", public)

    @property
    def service(self) -> str:
        return f"{self.url}/services/llmkit"

    def wait_until_ready(self) -> None:
        super().wait_until_ready()
        end = time.monotonic() + READY_S
        while time.monotonic() < end and not self.is_port_taken():
            if ask("GET", f"{self.service}/health/ready").status == 200:
                return
            time.sleep(0.1)
        raise AssertionError("the service was not ready:\n" + self.output())

    def pause(self) -> None:
        """The hub's own process answers nobody; its proxy goes on."""
        self._process.suspend()

    def resume(self) -> None:
        self._process.resume()

    def environment(self) -> dict[str, str]:
        """What a service that stands alone is told."""
        return {
            "JUPYTERHUB_API_URL": f"{self.hub_url}/hub/api",
            "JUPYTERHUB_API_TOKEN": self.alone_token,
            "JUPYTERHUB_SERVICE_NAME": "alone",
        }


class StandsAlone:
    """`llmkit hub` that no hub has started, in front of this user's running engines."""

    def __init__(self, hub: HubWithModels, folder: Path, settings: str = "") -> None:
        self.url = f"{hub.url}/services/alone"
        self.direct = f"http://127.0.0.1:{hub.alone_port}/services/alone"
        file = folder / "alone.toml"
        file.touch(mode=0o600)
        file.write_text(f"port = {hub.alone_port}\nhub_cache_s = {CACHE_S}\n{settings}")
        self._log = (folder / "alone.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmkit", "hub", "--config", str(file)],
            env={
                **os.environ,
                **hub.environment(),
                "LLMKIT_DB_URL": f"sqlite:///{folder}/alone.db",
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if ask("GET", f"{self.direct}/health/live").status == 200:
                    return
            time.sleep(0.05)
        self.stop()
        raise AssertionError("it did not start:\n" + self.output())

    def output(self) -> str:
        return Path(self._log.name).read_text()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._log.close()


class Visitor:
    """A browser without scripts."""

    def __init__(self, hub: HubWithModels) -> None:
        self.hub = hub
        self.jar = http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar))

    def get(self, url: str, **headers: str) -> Reply:
        return self._open(urllib.request.Request(url, headers=_named(headers)))

    def post(self, url: str, data: bytes, **headers: str) -> Reply:
        return self._open(urllib.request.Request(url, data, _named(headers), method="POST"))

    def _open(self, request: urllib.request.Request) -> Reply:
        try:
            with self.opener.open(request, timeout=60) as reply:
                body = reply.read() + f"<!-- {reply.url} -->".encode()
                return Reply(reply.status, reply.headers, body)
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    def log_in(self, user: str, page: str) -> Reply:
        """Ask for a page, and log in at the hub, which leads back to it."""
        login = self.get(page, Accept="text/html").body.decode()
        action = re.search(r'<form action="([^"]+)"', login)
        assert action, login
        form = {"username": user, "password": "any", "_xsrf": self.cookie("_xsrf", "/hub/")}
        url = urllib.parse.urljoin(self.hub.url, action[1].replace("&amp;", "&"))
        return self.post(url, urllib.parse.urlencode(form).encode(), Accept="text/html")

    def proof(self) -> str:
        """What the pages' scripts send with each request of theirs."""
        page = self.get(f"{self.hub.service}/chat", Accept="text/html").body.decode()
        found = re.search(r'data-proof="(\w+)"', page)
        assert found, page
        return found[1]

    def cookie(self, name: str, path: str) -> str:
        return next(str(c.value) for c in self.jar if c.name == name and c.path == path)


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
