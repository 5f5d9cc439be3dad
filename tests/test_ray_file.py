"""The file of `llmkit ray`: what becomes of it, and what is wrong with it. Needs no Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.cluster.ray import desired
from llmkit.cluster.ray_file import is_of, read_fleet, serve_config
from llmkit.errors import InvalidRequestError

WHOLE = """
name = "class"
gateways = ["tcp://gw-1:7100", "tcp://[fd00::1]:7100"]
fleet_key_file = "/etc/llmkit/fleet.key"
program = "/opt/llmkit/bin/llmkit"
drain_s = 30

[models.small]
model = "smollm2"
replicas = 2
num_cpus = 2

[models.large]
model = "/models/large.gguf"
min_replicas = 1
max_replicas = 8
target_queue = 6
num_gpus = 1
memory_gb = 0.5
resources = {a100 = 1}
labels = {"ray.io/accelerator-type" = "A100"}
n_ctx = 8192
threads = 3
flash_attention = true
context_shift = false
lora = ["a.gguf", "b.gguf"]
tensor_split = [3, 1]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_what_serve_takes(tmp_path: Path) -> None:
    config = serve_config(read_fleet(written(tmp_path, WHOLE)))
    small, large = config["applications"]
    assert config["proxy_location"] == "Disabled"
    assert (small["name"], large["name"]) == ("class-small", "class-large")
    assert small["route_prefix"] is None and small["import_path"] == "llmkit.cluster.ray:build"
    joins = ["--join", "tcp://gw-1:7100", "--join", "tcp://[fd00::1]:7100"]
    key = ["--fleet-key-file", "/etc/llmkit/fleet.key"]
    command = ["engine", "smollm2", "--name", "small", *joins, *key, "--threads", "2"]
    assert small["args"] == {
        "fleet": "class",
        "command": command,
        "drain_s": 30,
        "program": "/opt/llmkit/bin/llmkit",
    }
    (deployment,) = small["deployments"]
    assert deployment["num_replicas"] == 2 and "autoscaling_config" not in deployment
    assert deployment["graceful_shutdown_timeout_s"] > 30
    assert deployment["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}

    command = large["args"]["command"]
    assert command[:4] == ["engine", "/models/large.gguf", "--name", "large"]
    flags = ["--n-ctx", "8192", "--threads", "3", "--flash-attention", "--no-context-shift"]
    more = ["--lora", "a.gguf", "--lora", "b.gguf", "--tensor-split", "3,1"]
    assert command[-len(flags + more) :] == [*flags, *more]
    (deployment,) = large["deployments"]
    scale = deployment["autoscaling_config"]
    assert (scale["min_replicas"], scale["max_replicas"]) == (1, 8) and "num_replicas" not in large
    assert scale["target_ongoing_requests"] == 6
    assert deployment["ray_actor_options"] == {
        "num_cpus": 1,
        "num_gpus": 1,
        "memory": 1 << 29,
        "resources": {"a100": 1},
        "label_selector": {"ray.io/accelerator-type": "A100"},
    }


def test_what_the_engine_gets_is_what_its_command_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "--help-all"]) == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for each in serve_config(read_fleet(written(tmp_path, WHOLE)))["applications"]:
        for flag in each["args"]["command"]:
            if flag.startswith("--"):
                assert flag in known


def test_a_model_is_its_tables_name_and_one_gateway_needs_no_list(tmp_path: Path) -> None:
    text = 'gateways = "tcp://gw:7100"\n[models.smollm2]\n'
    (only,) = serve_config(read_fleet(written(tmp_path, text)))["applications"]
    assert only["args"]["command"][:4] == ["engine", "smollm2", "--name", "smollm2"]
    assert is_of("llmkit", only) and not is_of("class", only)
    assert not is_of("llmkit", {"import_path": "other:app", "args": {"fleet": "llmkit"}})


GATEWAY = 'gateways = ["tcp://gw:7100"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gateways = [", "cannot read the settings file"),
        ("[models.a]\n", "gateways is missing"),
        (GATEWAY, "there is no model"),
        (GATEWAY + "models = 1\n", "there is no model"),
        (GATEWAY + "[models]\na = 1\n", "[models.a]"),
        (GATEWAY + '[models."a b"]\n', "a name of letters"),
        (GATEWAY + '[models."../a"]\n', "a name of letters"),
        ('gateways = ["gw:7100"]\n[models.a]\n', "such as tcp://HOST:7100"),
        ("gateways = [1]\n[models.a]\n", "gateways must be"),
        (GATEWAY + "drain = 1\n[models.a]\n", "did you mean drain_s?"),
        (GATEWAY + 'name = "a/b"\n[models.a]\n', "name must be"),
        (GATEWAY + "[models.a]\nreplica = 1\n", "line 3"),
        (GATEWAY + "[models.a]\nreplica = 1\n", "did you mean replicas?"),
        (GATEWAY + "[models.a]\nreplicas = 0\n", "models.a.replicas must be an integer from 1"),
        (GATEWAY + "[models.a]\nmin_replicas = 2\n", "min_replicas needs max_replicas"),
        (GATEWAY + "[models.a]\nmax_replicas = 2\nmin_replicas = 3\n", "at least min_replicas"),
        (GATEWAY + "[models.a]\nmax_replicas = 2\nreplicas = 2\n", "leave it or max_replicas"),
        (GATEWAY + "[models.a]\nnum_gpus = -1\n", "num_gpus must be"),
        (
            GATEWAY + '[models.a]\nresources = {a100 = "1"}\n',
            "resources must be a table of numbers",
        ),
        (GATEWAY + "[models.a]\nlabels = {a = 1}\n", "labels must be a table of texts"),
        (GATEWAY + "[models.a]\nn_ctx = 0\n", "n_ctx must be"),
        (GATEWAY + "[models.a]\nkv_tokens = 4096\n", "kv_unified"),
        (GATEWAY + "[models.a]\nlora = {a = 0.5}\n", "lora must be the path"),
        (GATEWAY + "[models.a]\nisolated = true\n", "isolated is not a setting"),
    ],
)
def test_what_is_wrong_is_said(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidRequestError, match=r".") as caught:
        read_fleet(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert main(["ray", "config", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = "drain_s = -1\n[models.a]\nn_ctx = 0\n[models.b]\nnum_cpus = 'x'\n"
    with pytest.raises(InvalidRequestError) as caught:
        read_fleet(written(tmp_path, text))
    assert len(str(caught.value).split("\n")) == 4


def test_the_command_prints_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, WHOLE)
    assert main(["ray", "config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == serve_config(read_fleet(path))
    assert main(["ray", "config", str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "down"])
def test_without_a_cluster(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, WHOLE)
    assert main(["ray", command, str(path), "--address", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "nothing answers at http://127.0.0.1:9" in said and "ray start --head" in said
    assert main(["ray", command, str(path), "--address", "auto"]) == 1
    assert "address looks like" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("queues", "replicas"),
    [({}, 3), ({"a": 0.0, "b": 0.0}, 1), ({"a": 4.0}, 1), ({"a": 4.1}, 2), ({"a": 9, "b": 9}, 5)],
)
def test_how_many_replicas_a_load_wants(queues: dict[str, float], replicas: int) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics={"queue": queues},
        target_num_replicas=3,
        config=SimpleNamespace(target_ongoing_requests=4.0),
    )
    assert desired(context) == (replicas, {})
    context.aggregated_metrics = None
    assert desired(context) == (3, {})
