"""`llm.serve()`: finds the gateway of this kernel's Jupyter server, or starts one.

Prints the address and how to authenticate, never a secret.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from html import escape
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

from llmkit.errors import EngineError, LLMKitError
from llmkit.protocol import ModelDescription, Origin
from llmkit.system.process import python_path

__all__ = ["Endpoint", "find_or_start"]

NO_EXTENSION = (
    "llmkit is not active in this Jupyter server, so the model gets a gateway of its own. To serve "
    "it at the server's address, install llmkit in the environment that Jupyter runs in (pip "
    "enables the extension; check with `jupyter server extension list`) and restart the server."
)
START_TIMEOUT_S = 30
LISTED_AFTER_S = (0.0, 0.3, 0.6)  # a gateway looks for models four times a second
DB_URL = "LLMKIT_DB_URL"
# No proxy: the token must reach only this server.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Endpoint:
    """An address of this model for other programs.

    ``url`` is the OpenAI base URL; ``api_key`` is the secret, which is never displayed.
    """

    url: str
    model: str
    api_key: str = field(repr=False)
    how: str
    in_jupyter: bool
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        """Whether the gateway still runs; always True for Jupyter's."""
        return self._process is None or self._process.poll() is None

    @property
    def port(self) -> int:
        """The port of the model's own gateway; 0 for Jupyter's, whose port we do not choose."""
        return 0 if self.in_jupyter else urlsplit(self.url).port or 0

    def close(self) -> None:
        """Stop the model's own gateway; Jupyter's is left running."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def curl(self) -> str:
        """A shell command; needs the key in $OPENAI_API_KEY."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": "Hello!"}],
                "max_tokens": 32,
            }
        )
        address = shlex.quote(f"{self.url}/chat/completions")
        return (
            f'curl {address} -H "Authorization: Bearer $OPENAI_API_KEY" '
            f'-H "Content-Type: application/json" -d {shlex.quote(body)}'
        )

    @property
    def python(self) -> str:
        """A Python snippet; reads the key from $OPENAI_API_KEY."""
        return (
            "from openai import OpenAI\n"
            f"client = OpenAI(base_url={self.url!r})  # the key comes from $OPENAI_API_KEY\n"
            f"reply = client.chat.completions.create(model={self.model!r}, "
            'messages=[{"role": "user", "content": "Hello!"}], max_tokens=32)\n'
            "print(reply.choices[0].message.content)"
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a child process that uses this endpoint; secret, do not print."""
        return {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": self.api_key}

    def __repr__(self) -> str:
        return f"{self.model} at {self.url}\n\nKey: {self.how}\n\n{self.curl}\n\n{self.python}"

    def _repr_html_(self) -> str:
        return (
            f"<p><strong>{escape(self.model)}</strong> at <code>{escape(self.url)}</code></p>"
            f"<p>Key: {escape(self.how)}</p>"
            f"<pre>{escape(self.curl)}</pre><pre>{escape(self.python)}</pre>"
        )


def find_or_start(
    model: ModelDescription, origin: Origin, port: int, *, known: Endpoint | None = None
) -> Endpoint:
    """The gateway of the Jupyter server that owns this kernel, else a new one on loopback.

    With a ``port``, or if that server has no such gateway or does not list the model, a new one is
    started. One that was ``known`` stays if that server is too busy to answer. Raises `EngineError`
    when none can be had.
    """
    if origin.kernel_id is not None and port == 0:
        if known is not None and not known.alive:
            known = None
        endpoint = _in_jupyter(model, f"{model.name}@{origin.label}", known)
        if endpoint is not None:
            return endpoint
    if origin.pid is None:
        raise EngineError(
            f"{model.name!r} is already behind an endpoint, {origin.label}; use that address."
        )
    return _start(model, port, origin.pid)


def _in_jupyter(
    model: ModelDescription, exact: str, known: Endpoint | None = None
) -> Endpoint | None:
    """The gateway of the server that is this kernel's parent, found in the runtime directory.

    None if that does not list the model, whose ``exact`` name is its own wherever it lives; what
    was ``known`` if it does not answer.
    """
    try:
        from jupyter_server.serverapp import list_running_servers

        parent = int(os.environ.get("JPY_PARENT_PID", 0)) or os.getppid()
        server = next(
            s
            for s in list_running_servers(log=logging.getLogger("llmkit.silent"))
            if s.get("pid") == parent
        )
    except (ImportError, StopIteration, OSError, ValueError):
        return None
    url = f"{server['url'].rstrip('/')}/llmkit"
    token = str(server.get("token") or os.environ.get("JUPYTERHUB_API_TOKEN", ""))
    request = urllib.request.Request(
        f"{url}/v1/models", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        for delay in LISTED_AFTER_S:
            time.sleep(delay)
            with DIRECT.open(request, timeout=5) as reply:
                name = _name_of(model, exact, json.load(reply))
            if name is not None:
                break
        else:
            return None
    except urllib.error.HTTPError as error:
        if error.code == 404:
            print(NO_EXTENSION, file=sys.stderr)
        return None  # refused, so the token would not work for others either
    except (OSError, ValueError, HTTPException):
        return known
    how = (
        "the token of this Jupyter server "
        "(under JupyterHub: an API token of yours, such as $JUPYTERHUB_API_TOKEN)"
    )
    return Endpoint(f"{_public_url(url)}/v1", name, token, how, in_jupyter=True)


def _name_of(model: ModelDescription, exact: str, listing: Any) -> str | None:
    """By which of the listed names a gateway reaches this very model; None: by none.

    The newest of a name has the plain one, others are ``name@kernel``, with a number if there are
    several in the kernel.
    """
    entries = listing.get("data") if isinstance(listing, dict) else None
    ids = [
        str(entry.get("id"))
        for entry in entries or ()
        if isinstance(entry, dict) and entry.get("created") == model.created
    ]
    mine = [i for i in ids if i == exact or i.startswith(f"{exact}-")]
    return next((i for i in (*mine, *ids) if i in (*mine, model.name)), None)


def _public_url(url: str) -> str:
    """Under JupyterHub, the hub proxy's address: the server reports one inside its pod."""
    public = os.environ.get("JUPYTERHUB_PUBLIC_URL", "")
    return (
        f"{public.rstrip('/')}/llmkit"
        if public and "JUPYTERHUB_SERVICE_PREFIX" in os.environ
        else url
    )


def _first_line(output: IO[str]) -> str:
    """The first line of a process's output; empty after a timeout.

    Uses a thread, since `select` does not support pipes on Windows.
    """
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    reader.start()
    reader.join(START_TIMEOUT_S)
    return lines[0] if lines else ""


def _database() -> dict[str, str]:
    """The variable with the database of this process's sessions, which the gateway is to share.

    Other settings of the user are for a gateway of theirs: keys, hosts, models to load.
    """
    from llmkit.settings.serving import read_settings

    try:
        url = read_settings({}).gateway.db_url
    except LLMKitError:  # something else is wrong there, which `llmkit serve` would tell
        url = os.environ.get(DB_URL)
    return {DB_URL: url} if url else {}


def _start(model: ModelDescription, port: int, pid: int) -> Endpoint:
    """A gateway in a process of its own, which ends with this one.

    In the kernel, HTTP would compete with the engine for the GIL.
    """
    key = secrets.token_urlsafe(24)
    command = [
        sys.executable,
        "-m",
        "llmkit",
        "serve",
        "--attach",
        str(pid),
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LLMKIT_")}
    environment = {
        **inherited,
        **_database(),
        "LLMKIT_API_KEY": key,
        "LLMKIT_HOST": "127.0.0.1",
        "PYTHONPATH": python_path(),
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        line = _first_line(process.stdout)
        if " at " not in line:
            process.kill()
            process.wait()
            process.stdout.close()
            errors.seek(0)
            reason = errors.read().strip().splitlines()[-1:] or [
                f"no answer in {START_TIMEOUT_S} s"
            ]
            raise EngineError(f"the gateway did not start: {reason[0].removeprefix('llmkit: ')}")
    process.stdout.close()
    url = line.rsplit(" at ", 1)[1].strip()
    how = "a fresh one, in .api_key of this object; .environment has what a child process needs"
    return Endpoint(url, model.name, key, how, in_jupyter=False, _process=process)
