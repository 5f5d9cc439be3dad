"""Where a hub is, by its variables, and what of the settings has no effect with one or without."""

from __future__ import annotations

from pathlib import Path

import pytest
from settings_files import read

from llmkit.cli import main
from llmkit.cli.hub import settled
from llmkit.cli.offering import idle_fleet
from llmkit.cli.serving import HUBS
from llmkit.errors import InvalidRequestError
from llmkit.settings.hub_place import HubPlace
from llmkit.settings.serving import ServeSettings, ignored

GIVEN = {"JUPYTERHUB_API_URL": "http://hub:8081/jupyter/hub/api", "JUPYTERHUB_API_TOKEN": "secret"}


def test_the_place_of_a_hub() -> None:
    alone = HubPlace.of(GIVEN)
    assert (alone.prefix, alone.base_url) == ("/jupyter/services/llmkit", "/jupyter/")
    assert (alone.client_id, alone.listen) == ("service-llmkit", None)
    assert "secret" not in repr(alone)
    more = {
        "SERVICE_NAME": "ai",
        "SERVICE_PREFIX": "/services/ai/",
        "CLIENT_ID": "c",
        "BASE_URL": "/",
    }
    managed = HubPlace.of(
        GIVEN
        | {f"JUPYTERHUB_{name}": value for name, value in more.items()}
        | {"JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:4000"}
    )
    assert (managed.prefix, managed.scope) == ("/services/ai", "access:services!service=ai")
    assert managed.listen == ("127.0.0.1", 4000)
    options = settled(ServeSettings(), managed).gateway
    assert (options.port, options.base_path, options.admin) == (4000, "/services/ai", True)
    assert options.trusted_proxies == ()


def test_a_fleet_that_no_engine_can_join_is_said(tmp_path: Path) -> None:
    key, listen = 'fleet_key_file = "/k"', 'fleet_listen = "tcp://127.0.0.1:7100"'
    [note] = idle_fleet(read(key, tmp_path))
    assert note.startswith("fleet_key_file") and "fleet_listen" in note
    assert not idle_fleet(read(f"{key}\n{listen}", tmp_path))
    notes = idle_fleet(read(f'{key}\n{listen}\nmodel = ["echo"]', tmp_path))
    assert [n.split()[0] for n in notes] == ["fleet_key_file", "fleet_listen"]


FOR_A_HUB = """
cache_scope = "hub"
[quota.default]
tokens_per_day = 1000
[quota.groups.students]
requests_per_minute = 5
"""


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    text = 'rate = "5/minute"\nbase_path = "/x"\nadmin = false\nport = 5000\nhub_cache_s = 5'
    place = HubPlace.of(GIVEN)
    notes = settled(read(text, tmp_path), place).notes
    assert [note.split()[0] for note in notes] == ["rate", "base_path", "admin"]
    both = 'hub_proxies = ["10.0.0.7"]\ntrusted_proxies = ["10.0.0.0/8"]'
    [note] = settled(read(both, tmp_path), place).notes
    assert note.startswith("hub_proxies") and "trusted_proxies" in note
    managed = HubPlace.of(GIVEN | {"JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:4000"})
    assert "http://127.0.0.1:4000" in settled(read(text, tmp_path), managed).notes[-1]
    settings = read(FOR_A_HUB, tmp_path)
    assert len(ignored(settings, HUBS, "it is a hub's")) == 3
    assert not ignored(read("port = 1", tmp_path), HUBS, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"JUPYTERHUB_API_URL": ""}, r"\$JUPYTERHUB_API_URL is not set"),
        ({"JUPYTERHUB_API_TOKEN": " "}, r"\$JUPYTERHUB_API_TOKEN is not set"),
        ({"JUPYTERHUB_API_URL": "hub:8081"}, "an address such as"),
        ({"JUPYTERHUB_API_URL": "http://hub:8081"}, "/hub/api"),
        ({"JUPYTERHUB_API_URL": "http://hub:8081/hub"}, "/hub/api"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/a b/"}, "a path such as"),
        ({"JUPYTERHUB_SERVICE_URL": "https://127.0.0.1:1"}, "internal_ssl"),
    ],
)
def test_what_is_wrong_with_it(change: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        HubPlace.of(GIVEN | change)


def test_the_command_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    assert main(["hub", "echo"]) == 1
    said = capsys.readouterr().err
    assert "$JUPYTERHUB_API_URL and $JUPYTERHUB_API_TOKEN are not set" in said
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLMKIT_API_KEY", "k")
    assert main(["hub", "echo"]) == 1
    assert "no keys of its own" in capsys.readouterr().err
