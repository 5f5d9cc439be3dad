"""`llm.serve()` in a notebook: what may answer where a Jupyter server is said to be."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from llmkit.notebook import serving
from llmkit.protocol import ModelDescription


def test_whoever_talks_garbage_there_is_no_jupyter_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = {
            "pid": os.getpid(),
            "url": f"http://127.0.0.1:{listening.getsockname()[1]}/",
            "token": "t",
        }
        monkeypatch.setattr("jupyter_server.serverapp.list_running_servers", lambda log: [server])

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert serving._in_jupyter(ModelDescription("m", "m.gguf")) is None
        thread.join()
