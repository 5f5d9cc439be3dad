"""The file of `llmkit ray`: models, how many engines of each, and where. Pure but for `read_fleet`.

`serve_config` turns it into what Ray's own `serve deploy` and its HTTP interface take.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.cluster.ray import DEPLOYMENT
from llmkit.errors import InvalidRequestError
from llmkit.settings import table
from llmkit.settings.document import Document, open_document
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.options import OPTIONS, EngineOptions
from llmkit.settings.table import LISTS, Option, option
from llmkit.settings.values import brief

__all__ = ["APPLICATION", "RayFleet", "RayModel", "is_of", "read_fleet", "serve_config"]

APPLICATION, POLICY = "llmkit.cluster.ray:build", "llmkit.cluster.ray:desired"
FLEET, PLACE, SCALE = "Fleet", "Placement", "Scale"
GATEWAY = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
NAMED = "a name of letters, digits, . _ and -"
SPARE_S = 15.0  # of Serve's own limit, beyond an engine's
HEALTH_S, HEALTH_TIMEOUT_S = 2.0, 30.0
LOOK_BACK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayModel:
    """``[models.NAME]``: a model and its engines. ``engine`` holds the options of `llmkit engine`.

    ``max_replicas`` makes the number follow the load.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    model: str = option(
        "text", "", "Alias, or path of a GGUF file on the nodes; by default the table's name.",
        FLEET,
    )  # fmt: skip
    replicas: int | None = option("integer", None, "Engines.", SCALE, low=1, high=10_000)
    min_replicas: int = option("integer", 1, "Fewest engines.", SCALE, low=1, high=10_000)
    max_replicas: int | None = option("integer", None, "Most engines.", SCALE, low=1, high=10_000)
    target_queue: float = option(
        "number", 4.0, "Requests, running or waiting, that each engine shall have.", SCALE,
        low=0.1, high=1e6,
    )  # fmt: skip
    scale_up_s: float = option(
        "number", 10.0, "How long there must be too many requests.", SCALE, low=0.0, high=86_400.0
    )
    scale_down_s: float = option(
        "number", 300.0, "How long there must be too few.", SCALE, low=0.0, high=86_400.0
    )
    num_cpus: float = option(
        "number", 1.0, "Cores of each engine; also its threads, unless threads is set.", PLACE,
        low=0.0, high=1024.0,
    )  # fmt: skip
    num_gpus: float = option("number", 0.0, "GPUs of each engine.", PLACE, low=0.0, high=64.0)
    memory_gb: float | None = option(
        "number", None, "Memory that Ray keeps for each engine.", PLACE, low=0.001, high=1e6
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFleet:
    """The file: its top, and its ``models``."""

    models: tuple[RayModel, ...]
    name: str = option(
        "text", "llmkit", "Begins the names of what Ray Serve runs for this file.", FLEET,
        pattern=NAME, wanted=NAMED,
    )  # fmt: skip
    gateways: tuple[str, ...] = option(
        "texts", (), "Where engines announce themselves: fleet_listen of each gateway.", FLEET
    )
    fleet_key_file: str | None = option(
        "path", None, "The fleet's key on each node; by default the nodes' $LLMKIT_FLEET_KEY_FILE.",
        FLEET,
    )  # fmt: skip
    drain_s: float = option(
        "number", 60.0, "How long an engine that shall end may finish what runs.", FLEET,
        low=0.0, high=86_400.0,
    )  # fmt: skip
    program: str | None = option(
        "path", None, "Where llmkit is on the nodes, if not in Ray's own environment.", FLEET
    )


TOP = table.table(RayFleet)
OWN = table.table(RayModel)
ENGINE: Mapping[str, Option] = {
    **{name: row for name, row in OPTIONS.items() if name != "isolated"},
    **{name: GATEWAY_OPTIONS[name] for name in ("tuned", "force")},
}
MODEL: Mapping[str, Option] = {**OWN, **ENGINE}
TABLES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "resources": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf,
        "numbers, such as {a100 = 1}",
    ),
    "labels": (
        lambda v: isinstance(v, str) and bool(v.strip()),
        'texts, such as {"ray.io/accelerator-type" = "A100"}',
    ),
}


def read_fleet(path: Path) -> RayFleet:
    """Raises `InvalidRequestError`, with all that is wrong and where."""
    document = open_document(path)
    faults = list(_faults(document))
    if faults:
        raise InvalidRequestError("\n".join(faults), "config")
    values = document.values
    models = tuple(_model(name, given) for name, given in values["models"].items())
    top = {key: _listed(TOP[key], value) for key, value in values.items() if key in TOP}
    return RayFleet(models=models, **top)


def is_of(fleet: str, application: Mapping[str, Any]) -> bool:
    """Whether a configured application is one of this fleet."""
    args = application.get("args")
    return (
        application.get("import_path") == APPLICATION
        and isinstance(args, dict)
        and args.get("fleet") == fleet
    )


def serve_config(fleet: RayFleet) -> dict[str, Any]:
    """The configuration for Ray Serve: an application without a route for each model."""
    return {
        "proxy_location": "Disabled",
        "applications": [_application(fleet, model) for model in fleet.models],
    }


def _application(fleet: RayFleet, model: RayModel) -> dict[str, Any]:
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "ray_actor_options": _place(model),
        "graceful_shutdown_timeout_s": fleet.drain_s + SPARE_S,
        "graceful_shutdown_wait_loop_s": 0.1,  # Serve's own requests, of which there are none
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
    }
    if model.max_replicas is None:
        deployment["num_replicas"] = model.replicas or 1
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "target_ongoing_requests": model.target_queue,
            "upscale_delay_s": model.scale_up_s,
            "downscale_delay_s": model.scale_down_s,
            "look_back_period_s": LOOK_BACK_S,
            "policy": {"policy_function": POLICY},
        }
    args = {
        "fleet": fleet.name,
        "command": _command(fleet, model),
        "drain_s": fleet.drain_s,
        "program": fleet.program,
    }
    return {
        "name": f"{fleet.name}-{model.name}",
        "route_prefix": None,
        "import_path": APPLICATION,
        "args": args,
        "deployments": [deployment],
    }


def _place(model: RayModel) -> dict[str, Any]:
    place: dict[str, Any] = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
    if model.memory_gb is not None:
        place["memory"] = int(model.memory_gb * (1 << 30))
    if model.resources:
        place["resources"] = model.resources
    if model.labels:
        place["label_selector"] = model.labels
    return place


def _command(fleet: RayFleet, model: RayModel) -> list[str]:
    """`engine …`, without the program and what only the node knows."""
    command = ["engine", model.model or model.name, "--name", model.name]
    for gateway in fleet.gateways:
        command += ["--join", gateway]
    if fleet.fleet_key_file is not None:
        command += ["--fleet-key-file", fleet.fleet_key_file]
    options = dict(model.engine)
    # llama.cpp would take all cores of the node, for each of its engines.
    options.setdefault("threads", max(1, int(model.num_cpus)))
    for key, value in options.items():
        flag = key.replace("_", "-")
        if ENGINE[key].kind in ("flag", "switch"):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                command += [f"--{flag}", str(each)]
    return command


def _model(name: str, given: Mapping[str, Any]) -> RayModel:
    own = {key: value for key, value in given.items() if key in OWN or key in TABLES}
    engine = {key: value for key, value in given.items() if key in ENGINE}
    shares = engine.get("tensor_split")
    if isinstance(shares, list):
        engine["tensor_split"] = ",".join(map(str, shares))
    return RayModel(name=name, engine=engine, **own)


def _listed(row: Option, value: Any) -> Any:
    return tuple([value] if isinstance(value, str) else value) if row.kind in LISTS else value


def _faults(document: Document) -> Iterator[str]:
    values = document.values

    def fault(message: str, *key: str) -> str:
        line = document.line_of(key)
        return f"{message.rstrip('.')} ({document.path}{f', line {line}' if line else ''})."

    for key, value in values.items():
        if key != "models":
            for message in _wrong(key, value, TOP, ("models",)):
                yield fault(message, key)
    gateways = values.get("gateways", ())
    gateways = [gateways] if isinstance(gateways, str) else gateways
    if not gateways:
        yield fault('gateways is missing: where engines announce themselves, ["tcp://HOST:7100"]')
    for each in gateways if isinstance(gateways, list) else ():
        if not isinstance(each, str) or not GATEWAY.fullmatch(each):
            yield fault(f"gateways must be addresses such as tcp://HOST:7100, not {brief(each)}",
                        "gateways")  # fmt: skip
    models = values.get("models")
    if not isinstance(models, dict) or not models:
        yield fault("there is no model: write a table [models.NAME] for each", "models")
        return
    for name, given in models.items():
        at = f"models.{name}"
        if not re.fullmatch(NAME, name):
            yield fault(f"[models.{brief(name)}]: what callers say must be {NAMED}", "models", name)
        elif not isinstance(given, dict):
            yield fault(f"{at} must be a table: [{at}]", "models", name)
        else:
            for key, message in _model_faults(given):
                yield fault(f"{at}.{message}", "models", name, key)


def _model_faults(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key, and what is wrong with it."""
    wrong = False
    for key, value in given.items():
        for message in _wrong(key, value, MODEL, TABLES):
            wrong = True
            yield key, message
    if wrong:
        return
    least, most = given.get("min_replicas", 1), given.get("max_replicas")
    if most is None and "min_replicas" in given:
        yield "min_replicas", "min_replicas needs max_replicas; a fixed number is replicas"
    if most is not None and "replicas" in given:
        yield "replicas", "replicas is a fixed number; leave it or max_replicas out"
    if most is not None and most < least:
        yield "max_replicas", f"max_replicas must be at least min_replicas, {least}, not {most}"
    engine = {key: value for key, value in given.items() if key in OPTIONS}
    try:
        EngineOptions(**engine)
    except InvalidRequestError as error:
        yield error.param or "", str(error)


def _wrong(key: str, value: Any, rows: Mapping[str, Option], tables: Any) -> Iterator[str]:
    if key in tables:
        right, wanted = TABLES[key]
        if not isinstance(value, dict) or not all(map(right, value.values())):
            yield f"{key} must be a table of {wanted}, not {brief(value)}"
    elif key not in rows:
        close = difflib.get_close_matches(key, [*rows, *tables], n=1)
        yield f"{key} is not a setting" + (f"; did you mean {close[0]}?" if close else "")
    elif key == "lora" and not _are_paths(value):
        yield "lora must be the path of an adapter, or a list of paths"
    else:
        row = rows[key]
        try:
            row.check(_listed(row, value))
        except InvalidRequestError as error:
            yield str(error)


def _are_paths(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )
