"""What `deploy/` has for a JupyterHub, as far as it can be checked without a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from deploy_tools import DEPLOY, run, tool
from test_deploy import CHART, Loader, deployments, rendered

from llmkit.cluster.address import hub_address
from llmkit.gateway.access.hub_opening import HubProxies
from llmkit.settings.hub import HubOptions
from llmkit.settings.hub_place import HubPlace

__all__ = ["rendered"]  # a fixture

PROMETHEUS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}


def let_in(resources: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Who may reach the gateway's port; None is everybody."""
    policy = next(e for e in resources if e["metadata"]["name"] == "llmkit-gateway")
    (http,) = (e for e in policy["spec"]["ingress"] if e["ports"][0]["port"] == "http")
    peers: list[dict[str, Any]] | None = http.get("from")
    return peers


def test_the_service_of_a_hub(rendered: dict[str, list[dict[str, Any]]]) -> None:
    """It has the hub's token and no key, may ask the hub, and answers where the proxy looks."""
    resources = rendered["hub"]
    template = dict(deployments(resources))["llmkit"]
    assert template["metadata"]["labels"]["hub.jupyter.org/network-access-hub"] == "true"
    (container,) = template["spec"]["containers"]
    assert container["args"][0] == "hub" and not any("base-path" in a for a in container["args"])
    given = {each["name"]: each for each in container["env"]}
    token = {"name": "hub", "key": "hub.services.llmkit.apiToken"}
    assert given["JUPYTERHUB_API_TOKEN"]["valueFrom"]["secretKeyRef"] == token
    assert "LLMKIT_API_KEY" not in given
    environment = {name: each["value"] for name, each in given.items() if "value" in each}
    place = HubPlace.of({**environment, "JUPYTERHUB_API_TOKEN": "t"})
    assert place.prefix == "/jupyter/services/llmkit" and place.base_url == "/jupyter/"
    assert container["livenessProbe"]["httpGet"]["path"] == f"{place.prefix}/health/live"
    assert "llmkit-keys" not in {each["metadata"]["name"] for each in resources}
    policy = next(e for e in resources if e["metadata"]["name"] == "llmkit-gateway")
    to_hub = {
        "ports": [{"port": 8081, "protocol": "TCP"}],
        "to": [{"podSelector": {"matchLabels": {"app": "jupyterhub", "component": "hub"}}}],
    }
    assert to_hub in policy["spec"]["egress"]
    # The hub's proxy gets in and says who its clients are, the hub itself, which looks whether we
    # are there, and Prometheus; nobody else.
    proxy, hub, prometheus = let_in(resources) or ()
    assert proxy == {"podSelector": {"matchLabels": {"app": "jupyterhub", "component": "proxy"}}}
    assert hub == {"podSelector": {"matchLabels": {"app": "jupyterhub", "component": "hub"}}}
    assert prometheus == PROMETHEUS
    (proxies,) = (a for a in container["args"] if a.startswith("--hub-proxies="))
    options = HubOptions(hub_proxies=tuple(proxies.partition("=")[2].split(",")))
    assert HubProxies(place, options, ()).trusts("10.1.2.3")
    (monitor,) = (e for e in resources if e["kind"] == "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == f"{place.prefix}/metrics"
    assert endpoint["authorization"]["credentials"] == token


def test_prometheus_gets_in_wherever_not_everybody_may(
    rendered: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert let_in(rendered["default"]) is None
    assert let_in(rendered["many"]) == [
        {"namespaceSelector": {"matchLabels": {"team": "a"}}},
        PROMETHEUS,
    ]
    anywhere = template(tmp_path, networkPolicy={"prometheus": {"namespace": ""}})
    assert (let_in(anywhere) or [])[-1] == PROMETHEUS | {"namespaceSelector": {}}


@pytest.mark.parametrize(
    ("gateway", "is_given"),
    [
        ({}, True),
        ({"config": "# trusted_proxies = []\n[quota.default]\nconcurrent = 1\n"}, True),
        ({"config": 'port_x = 1\n  hub_proxies = ["10.0.0.7"]\n'}, False),
        ({"config": 'trusted_proxies = ["10.0.0.7"]\n'}, False),
        ({"config": '"trusted_proxies"=["10.0.0.7"]\n'}, False),
        ({"config": 'gateway.trusted_proxies = ["10.0.0.7"]\n'}, False),
        ({"args": ["--trusted-proxies=10.0.0.7"]}, False),
        ({"args": ["--hub-proxies", "10.0.0.7"]}, False),
    ],
)
def test_proxies_that_an_operator_names_stand_alone(
    gateway: dict[str, Any], is_given: bool, tmp_path: Path
) -> None:
    """Else each start would say that hub_proxies has no effect."""
    (container,) = dict(deployments(template(tmp_path, gateway=gateway)))["llmkit"]["spec"][
        "containers"
    ]
    given = [a for a in container["args"] if a.startswith("--hub-proxies=10.0.0.0/8,")]
    assert len(given) == is_given


def template(folder: Path, **values: Any) -> list[dict[str, Any]]:
    """The resources of a hub's service with some values."""
    path = folder / "values.yaml"
    monitor = {"enabled": True}
    path.write_text(yaml.safe_dump({"hub": monitor, "serviceMonitor": monitor, **values}))
    env = {**os.environ, "HOME": str(folder)}
    text = run(tool("helm"), "template", "llmkit", CHART, "-f", path, env=env)
    return [each for each in yaml.load_all(text, Loader) if each]


def test_the_hub_s_own_configuration() -> None:
    """The samples name what there is: commands, scopes, variables and the chart's Service."""
    folder = DEPLOY / "jupyterhub"
    values = yaml.load((folder / "z2jh-values.yaml").read_text(), Loader)
    scope = "access:services!service=llmkit"
    service = values["hub"]["services"]["llmkit"]
    assert service["url"] == "http://llmkit:3000"
    assert scope in service["oauth_client_allowed_scopes"]
    assert {"self", scope} <= set(values["hub"]["loadRoles"]["user"]["scopes"])
    assert scope in values["hub"]["config"]["Spawner"]["server_token_scopes"]
    url = values["singleuser"]["extraEnv"]["LLMKIT_HUB_URL"]
    assert hub_address({"LLMKIT_HUB_URL": url}, "t").path == "/services/llmkit"
    text = (folder / "jupyterhub_config.py").read_text()
    given = SimpleNamespace(JupyterHub=SimpleNamespace(), Spawner=SimpleNamespace())
    given.Spawner.environment = {}
    exec(compile(text, "jupyterhub_config.py", "exec"), {"get_config": lambda: given})
    (made,) = given.JupyterHub.services
    assert made["command"][1] == "hub" and made["name"] == "llmkit"
    assert scope in given.Spawner.server_token_scopes
    assert "custom:llmkit:admin" in given.JupyterHub.custom_scopes
