"""`llmkit ray`: engines on a Ray cluster, by the HTTP interface of Ray Serve.

The command is never a driver: it needs no Ray, nor the cluster's version of Python.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.errors import InvalidRequestError, LLMKitError

if TYPE_CHECKING:
    from llmkit.cli.endpoint import Endpoint

__all__ = ["register"]

APPLICATIONS = "/api/serve/applications/"
LOOK_S, ANSWER_S = 0.5, 60.0
FAILED = ("DEPLOY_FAILED",)

File = Annotated[Path, typer.Argument(metavar="FILE", help="TOML file: models, how many, where.")]
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_DASHBOARD_ADDRESS", help="Ray's dashboard, on the head node of the cluster."
    ),
]
Wait = Annotated[float, typer.Option(help="How long to wait for it; 0: not at all.")]
HEAD = "http://127.0.0.1:8265"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="ray", help="Run engines on a Ray cluster, from a file.", no_args_is_help=True
    )
    group.command()(up)
    group.command()(down)
    group.command()(config)
    app.add_typer(group, rich_help_panel="Serving")


def config(file: File) -> int:
    """Print the file as a configuration for `serve deploy` or a RayService (JSON is YAML)."""
    from llmkit.cluster.ray_file import read_fleet, serve_config

    print(json.dumps(serve_config(read_fleet(file)), indent=2))
    return 0


def up(file: File, address: Address = HEAD, wait_s: Wait = 600.0) -> int:
    """Start what the file says, or change what runs to it; other applications stay as they are.

    Engines whose own settings are the same go on; others are drained and started anew.
    """
    from llmkit.cluster.ray_file import is_of, read_fleet, serve_config

    fleet = read_fleet(file)
    wanted = serve_config(fleet)
    names = [each["name"] for each in wanted["applications"]]
    endpoint = _endpoint(address)
    others = list(_others(_details(endpoint), fleet.name))
    for each in others:
        if each["name"] in names:
            raise LLMKitError(
                f"Ray Serve already runs {each['name']!r}, which is not of this file; set another "
                "name at the top of the file."
            )
    _put(endpoint, {**wanted, "applications": [*others, *wanted["applications"]]})
    if not wait_s:
        return 0
    seen: dict[str, str] = {}
    for details in _looks(endpoint, wait_s, f"not all of {', '.join(names)} is running"):
        running = details.get("applications", {})
        gone = [
            n
            for n, a in running.items()
            if is_of(fleet.name, a.get("deployed_app_config") or {}) and n not in names
        ]
        for name in names:
            application = running.get(name, {})
            state = _state(application)
            if seen.get(name) != state:
                seen[name] = state
                print(f"{name}: {state}", flush=True)
            if application.get("status") in FAILED:
                raise LLMKitError(f"{name} could not be started: {_reason(application)}")
        if not gone and all(running.get(n, {}).get("status") == "RUNNING" for n in names):
            break
    return 0


def down(file: File, address: Address = HEAD, wait_s: Wait = 600.0) -> int:
    """Drain and end what `llmkit ray up` started from this file."""
    from llmkit.cluster.ray_file import is_of, read_fleet

    fleet = read_fleet(file)
    endpoint = _endpoint(address)
    details = _details(endpoint)
    ours = {
        name
        for name, each in details.get("applications", {}).items()
        if is_of(fleet.name, each.get("deployed_app_config") or {})
    }
    if not ours:
        print(f"nothing of {fleet.name} runs at {address}")
        return 0
    _put(
        endpoint,
        {"proxy_location": _proxies(details), "applications": list(_others(details, fleet.name))},
    )
    if wait_s:
        for now in _looks(endpoint, wait_s, "engines are still finishing what runs"):
            if not ours & set(now.get("applications", {})):
                break
        print(f"ended {', '.join(sorted(ours))}")
    return 0


def _proxies(details: Mapping[str, Any]) -> str:
    return str(details.get("proxy_location") or "Disabled")


def _others(details: Mapping[str, Any], fleet: str) -> Iterator[dict[str, Any]]:
    """What else was configured the same way: what a configuration leaves out, Serve ends."""
    from llmkit.cluster.ray_file import is_of

    for each in details.get("applications", {}).values():
        configured = each.get("deployed_app_config")
        if configured and not is_of(fleet, configured):
            yield configured


def _looks(endpoint: Endpoint, wait_s: float, late: str) -> Iterator[Mapping[str, Any]]:
    """How it is, again and again. Raises `LLMKitError` when it is ``late``."""
    until = time.monotonic() + wait_s
    while True:
        yield _details(endpoint)
        if time.monotonic() > until:
            raise LLMKitError(f"after {wait_s:g} s {late}; `serve status` says more.")
        time.sleep(LOOK_S)


def _state(application: Mapping[str, Any]) -> str:
    status = str(application.get("status", "NOT_STARTED")).lower().replace("_", " ")
    replicas = [r for d in application.get("deployments", {}).values() for r in d["replicas"]]
    ready = sum(each.get("state") == "RUNNING" for each in replicas)
    return f"{status}, {ready} of {len(replicas)} engines ready" if replicas else status


def _reason(application: Mapping[str, Any]) -> str:
    """Why it cannot be started: the engine's own words, without the traces of Ray's actors."""
    deployments = application.get("deployments", {}).values()
    told = [each.get("message", "") for each in deployments] + [application.get("message", "")]
    text = next((each for each in told if each), "Ray Serve does not say why.")
    own = text.rpartition("llmkit.errors.EngineGoneError: ")[2]
    return f"{own.strip():.4000}"


def _endpoint(address: str) -> Endpoint:
    from llmkit.cli.endpoint import Endpoint

    return Endpoint(address.rstrip("/"), _token(), from_environment=False)


def _token() -> str:
    """What Ray's own commands send to a cluster that asks for a token."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    if given:
        return given.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        return Path(path).expanduser().read_text().strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return ""


def _details(endpoint: Endpoint) -> dict[str, Any]:
    details = _call(endpoint, "GET")
    if not isinstance(details, dict):
        raise LLMKitError(f"{endpoint.root} is not Ray's dashboard.")
    return details


def _put(endpoint: Endpoint, wanted: Mapping[str, Any]) -> None:
    _call(endpoint, "PUT", wanted)


def _call(endpoint: Endpoint, method: str, body: Any = None) -> Any:
    """Raises `LLMKitError` that says what to do about it."""
    from llmkit.cli.endpoint import EndpointError

    try:
        reply = endpoint.call(method, APPLICATIONS, body, at_root=True, timeout_s=ANSWER_S)
    except EndpointError as error:
        raise LLMKitError(
            f"{error}. Is a Ray cluster running there? `ray start --head` starts one; its "
            "dashboard is --address, by default http://127.0.0.1:8265."
        ) from None
    text = reply.body.decode("utf-8", "replace").strip()
    if reply.status in (401, 403):
        raise LLMKitError(
            "the cluster asks for its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file."
        )
    if reply.status >= 300:
        raise LLMKitError(f"Ray Serve refuses (status {reply.status}): {text:.1000}")
    if not text:
        return {}
    try:
        return reply.json()
    except EndpointError:
        if method == "GET":
            raise InvalidRequestError(
                f"{endpoint.root} is not Ray's dashboard: it answers {text[:60]!r}.", "address"
            ) from None
        return {}
