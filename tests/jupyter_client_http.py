"""A real Jupyter server in a subprocess and a real kernel behind it, driven over HTTP and WebSocket
as a browser would."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

START_TIMEOUT_S = 60
CELL_TIMEOUT_S = 180


class JupyterServer:
    """``url`` ends without a slash; ``token`` opens it. ``stop()`` ends it and its kernels."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        runtime: Path | None = None,
        app: str = "jupyter_server",
        base_url: str = "/",
    ) -> None:
        self.token = secrets.token_hex(16)
        self.runtime = runtime or folder / "runtime"
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.log = (folder / f"server-{self.token[:6]}.log").open("w+")
        with socket.socket() as s:  # jupyter takes the next free port if this one is gone by then
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {
            **os.environ,
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTER_TOKEN": self.token,
            "IPYTHONDIR": str(folder / "ipython"),
        }
        command = [
            sys.executable,
            "-m",
            app,
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            f"--ServerApp.base_url={base_url}",
        ]
        command += [
            f"--ServerApp.root_dir={folder}",
            "--allow-root",
            "--ServerApp.allow_unauthenticated_access=False",
            *args,
        ]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.url = self._wait_for_url(port, base_url)

    def _wait_for_url(self, port: int, base_url: str) -> str:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self.process.poll() is None:
            for file in self.runtime.glob("jpserver-*.json"):
                with contextlib.suppress(OSError, ValueError):  # it is just written, or removed
                    info = json.loads(file.read_text())
                    if info.get("pid") == self.process.pid:
                        url = str(info["url"]).replace("localhost", "127.0.0.1").rstrip("/")
                        with urllib.request.urlopen(f"{url}/api", timeout=5):
                            return url
            time.sleep(0.1)
        raise AssertionError("the Jupyter server did not start:\n" + self.output())

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def request(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Authorization": f"Bearer {token or self.token}"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read()
            return json.loads(text) if text else None

    def kernel(self) -> Kernel:
        return Kernel(self, self.request("POST", "/api/kernels", {"name": "python3"})["id"])

    def notebook(self, path: str) -> Kernel:
        """The kernel of a notebook, of which only the server knows."""
        kernel = {"name": "python3"}
        asked = {"path": path, "name": path, "type": "notebook", "kernel": kernel}
        return Kernel(self, self.request("POST", "/api/sessions", asked)["kernel"]["id"])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Kernel:
    """A kernel of a server. ``run`` waits for a cell and gives what it printed; ``start`` does not
    wait."""

    def __init__(self, server: JupyterServer, kernel_id: str) -> None:
        self.server, self.id = server, kernel_id
        self.connect()

    def connect(self) -> None:
        url = (
            f"{self.server.url.replace('http', 'ws', 1)}/api/kernels/{self.id}/channels"
            f"?session_id={uuid.uuid4().hex}"
        )
        self.ws = websocket.create_connection(
            url, header=[f"Authorization: Bearer {self.server.token}"], timeout=START_TIMEOUT_S
        )
        self.ws.settimeout(1)
        # What a kernel publishes before the server has subscribed to it is lost: ask until
        # an answer is heard.
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            try:
                for _ in self.messages(self._send("kernel_info_request", {}), 5):
                    pass
                return
            except TimeoutError:
                pass
        raise AssertionError("the kernel publishes nothing:\n" + self.server.output())

    def _send(self, kind: str, content: dict[str, Any]) -> str:
        message_id = uuid.uuid4().hex
        header = {
            "msg_id": message_id,
            "msg_type": kind,
            "username": "t",
            "session": "s",
            "version": "5.3",
            "date": "",
        }
        self.ws.send(
            json.dumps(
                {
                    "header": header,
                    "parent_header": {},
                    "metadata": {},
                    "content": content,
                    "channel": "shell",
                    "buffers": [],
                }
            )
        )
        return message_id

    def start(self, code: str) -> str:
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,
        }
        return self._send("execute_request", content)

    def messages(
        self, message_id: str, timeout: float = CELL_TIMEOUT_S
    ) -> Iterator[dict[str, Any]]:
        """What a request makes the kernel send, as it comes, until the kernel is idle again.

        Raises ``TimeoutError`` after ``timeout`` seconds; the socket's own timeout would begin anew
        with each ping and each message of a widget.
        """
        end = time.monotonic() + timeout
        while True:
            if time.monotonic() > end:
                raise TimeoutError(f"the kernel was not idle again within {timeout} s")
            try:
                message = json.loads(self.ws.recv())
            except websocket.WebSocketTimeoutException:
                continue
            if message["parent_header"].get("msg_id") == message_id:
                yield message
                if (
                    message["msg_type"] == "status"
                    and message["content"]["execution_state"] == "idle"
                ):
                    return

    def wait(self, message_id: str) -> tuple[str, str | None]:
        """(stdout and results, error) of a started cell."""
        text, error = "", None
        for message in self.messages(message_id):
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "execute_result":
                text += content["data"].get("text/plain", "")
            elif kind == "error":
                error = f"{content['ename']}: {content['evalue']}\n" + "\n".join(
                    content["traceback"]
                )
        return text, error

    def run(self, code: str) -> str:
        text, error = self.wait(self.start(code))
        assert error is None, error
        return text

    def interrupt(self) -> None:
        self.server.request("POST", f"/api/kernels/{self.id}/interrupt")

    def restart(self) -> None:
        self.server.request("POST", f"/api/kernels/{self.id}/restart")
        self.ws.close()
        self.connect()

    def close(self) -> None:
        self.ws.close()
