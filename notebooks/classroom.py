"""Lesson 9's class, for readers without a JupyterHub: the real `llmkit hub`, and a stand-in for the
hub that knows two students. Where there is a hub, the lesson uses that."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCOPE = "access:services!service=llmkit"
SETTINGS = """
port = 0
host = "127.0.0.1"
model = "smollm2"
n_slots = 2
n_ctx = 1024

[quota.default]
tokens_per_day = 100_000

[quota.groups.late]
tokens_per_day = 300
"""
START_S = 120


class Classroom:
    """Ann, and bob, who is in the group ``late``; eve has no rights.

    ``tokens`` are theirs, ``url`` is the service's. ``close`` ends both.
    """

    def __init__(self) -> None:
        people = {"ann": ([], [SCOPE]), "bob": (["late"], [SCOPE]), "eve": ([], [])}
        self.tokens = {name: secrets.token_hex(16) for name in people}
        models = {
            self.tokens[name]: {"kind": "user", "name": name, "groups": groups, "scopes": scopes}
            for name, (groups, scopes) in people.items()
        }

        class Hub(BaseHTTPRequestHandler):
            """`GET /hub/api/user` tells whose the token of a request is."""

            def do_GET(self) -> None:
                model = models.get(self.headers.get("Authorization", "").partition(" ")[2])
                body = json.dumps(model or {}).encode()
                self.send_response(200 if model else 403)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=self._hub.serve_forever, daemon=True).start()
        self._folder = tempfile.TemporaryDirectory(prefix="llmkit-class-")
        folder = Path(self._folder.name)
        settings = folder / "hub.toml"
        settings.write_text(SETTINGS)
        environment = {
            **os.environ,
            "JUPYTERHUB_API_URL": f"http://127.0.0.1:{self._hub.server_port}/hub/api",
            "JUPYTERHUB_API_TOKEN": secrets.token_hex(16),
            "LLMKIT_DB_URL": f"sqlite:///{folder}/llmkit.db",
            "PYTHONUNBUFFERED": "1",
        }
        log = folder / "service.log"
        with log.open("w") as output:
            self._service = subprocess.Popen(
                [sys.executable, "-m", "llmkit", "hub", "--config", str(settings)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.url = self._wait(log)
        os.environ["LLMKIT_HUB_URL"] = self.url
        os.environ["JUPYTERHUB_API_TOKEN"] = self.tokens["ann"]

    def _wait(self, log: Path) -> str:
        """Its address, once the model is loaded."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._service.poll() is None:
            said = log.read_text()
            if " is ready" in said:
                return said.partition("llmkit gateway at ")[2].split()[0].removesuffix("/v1")
            time.sleep(0.1)
        said = log.read_text()
        self.close()
        raise RuntimeError(f"the service did not start:\n{said}")

    def close(self) -> None:
        self._service.terminate()
        self._service.wait(30)
        self._hub.shutdown()
        self._hub.server_close()
        self._folder.cleanup()


def usage(url: str, token: str) -> dict[str, object]:
    """What the service says that the owner of a token has used."""
    request = urllib.request.Request(f"{url}/usage", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        found: dict[str, object] = json.load(reply)
    return found
