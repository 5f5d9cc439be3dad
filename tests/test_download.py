"""Downloads from a hub on loopback: what is fetched, resumed, refused, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback_hub import COMMIT, DATA, FILE, OTHER, Hub, fetch, forget_session, parts

import llmkit
from llmkit.cli import main
from llmkit.errors import (
    DownloadError,
    InvalidRequestError,
    LLMKitError,
    ModelNotFoundError,
)
from llmkit.models import download, transfer
from llmkit.models.download import DownloadEvent
from llmkit.models.hub import HubName, is_hub_name
from llmkit.models.library import Library


def test_into_the_cache_of_hugging_face(hub: Hub, tmp_path: Path) -> None:
    events: list[DownloadEvent] = []
    path = fetch(on_event=events.append)
    assert path.read_bytes() == DATA and path.name == FILE and COMMIT in path.parts
    assert [e.phase for e in (events[0], events[-1])] == ["looking", "done"]
    assert {e.total for e in events[1:]} == {len(DATA)} and events[-1].done == len(DATA)
    assert sorted(e.done for e in events) == [e.done for e in events]
    assert any(len(e.digest) == 64 for e in events) and not parts(tmp_path)
    assert Library(None).models()[0].id == f"org/m:{FILE}"
    hub.requests.clear()
    assert fetch() == path and not hub.gets(), "what is here is not fetched again"
    from huggingface_hub import try_to_load_from_cache

    assert try_to_load_from_cache("org/m", FILE) == str(path), "other programs find it"


def test_into_a_folder(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    path = fetch(models_dir=folder)
    assert path == folder / "org" / "m" / FILE and path.read_bytes() == DATA
    assert Library(folder, cache=tmp_path / "none").find("org/m/m-q4_k_m").path == path
    hub.requests.clear()
    assert fetch(models_dir=folder) == path and not hub.gets(), "its checksum is right"
    path.write_bytes(DATA[:-1] + b"!")
    assert fetch(models_dir=folder).read_bytes() == DATA, "a damaged file is replaced"
    hub.content["org/m"][FILE] = DATA + b"newer"
    assert fetch(models_dir=folder).read_bytes() == DATA + b"newer"
    assert not parts(tmp_path)
    with pytest.raises(ModelNotFoundError):
        Library(folder, cache=tmp_path / "none").find("org/m/other")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/m:Q4_K_M", FILE),
        ("org/m:q8_0", "m-Q8_0.gguf"),
        ("org/m", FILE),
        ("org/m@main:Q8_0", "m-Q8_0.gguf"),
        (f"org/m@{COMMIT}", FILE),
        (f"https://huggingface.co/org/m/blob/main/{FILE}", FILE),
        ("hf.co/org/m:Q8_0", "m-Q8_0.gguf"),
    ],
)
def test_what_a_name_means(hub: Hub, name: str, file: str) -> None:
    done = download.download(name)
    assert done.path.name == file and done.name.endswith(file)


def test_a_type_in_several_forms(hub: Hub, tmp_path: Path) -> None:
    names = ["Q8_0/big-00001-of-00002.gguf", "Q8_0/big-00002-of-00002.gguf", "big-IQ4_XS.gguf"]
    eyes = {"mmproj-F32.gguf": b"GGUF 32", "mmproj-F16.gguf": b"GGUF 16", "big-imatrix.gguf": b"no"}
    hub.content["org/big"] = {n: b"GGUF" + n.encode() * 9 for n in names} | eyes
    done = download.download("org/big:Q8_0", mmproj=True, models_dir=tmp_path / "models")
    assert [f.name for f in done.files] == [n.split("/")[1] for n in names[:2]]
    assert done.mmproj is not None and done.mmproj.read_bytes() == b"GGUF 16"
    assert all((tmp_path / "models" / "org" / "big" / n).exists() for n in names[:2])
    assert fetch("org/big").name == "big-IQ4_XS.gguf", "the usual one"
    hub.content["org/big"]["other-IQ4_XS.gguf"] = b"x"
    with pytest.raises(ModelNotFoundError, match=r"several IQ4_XS: big-IQ4_XS\.gguf .*, other-IQ4"):
        fetch("org/big:IQ4_XS")
    with pytest.raises(ModelNotFoundError, match="has no Q2_K; it has Q8_0/big-00001-of-00002"):
        fetch("org/big:Q2_K")
    with pytest.raises(ModelNotFoundError, match="no mmproj"):
        download.download("org/m", mmproj=True)
    hub.content["org/none"] = {"mmproj-F16.gguf": b"x", "README.md": b"x"}
    with pytest.raises(ModelNotFoundError, match="has no GGUF model"):
        fetch("org/none")
    hub.content["org/odd"] = {"alpha.gguf": b"x", "beta.gguf": b"y"}
    with pytest.raises(ModelNotFoundError, match=r"several models: alpha\.gguf .*, beta\.gguf"):
        fetch("org/odd")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_ends_early_is_taken_up_again(hub: Hub, ranges: bool) -> None:
    hub.ranges, hub.cut_after = ranges, [200_000, 150_000, 0]
    assert fetch().read_bytes() == DATA
    asked = [h.get("Range") for h in hub.gets()]
    assert asked[0] is None and len(asked) == 4
    if ranges:
        assert asked[1:] == ["bytes=200000-", "bytes=350000-", "bytes=350000-"]


def test_what_is_kept_is_taken_up_by_the_next_try(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    for where in (None, tmp_path / "models"):
        hub.cut_after = [300_000, 0, 0]
        with pytest.raises(DownloadError, match=r"closed connection.*; 0\.3 MB are kept"):
            fetch(models_dir=where)
        (part,) = parts(tmp_path)
        assert part.read_bytes() == DATA[:300_000]
        (unfinished,) = Library(where).models().problems
        assert str(part) in unfinished and "0.3 MB of an unfinished download" in unfinished
        hub.requests.clear()
        assert fetch(models_dir=where).read_bytes() == DATA and not parts(tmp_path)
        assert [h.get("Range") for h in hub.gets()] == ["bytes=300000-"]
    assert Library(tmp_path / "models").models()[0].id == "org/m/m-Q4_K_M"


def test_cancelled_at_any_time(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "INTERVAL_S", 0.0)
    cancel = threading.Event()
    seen: list[DownloadEvent] = []

    def on_event(event: DownloadEvent) -> None:
        seen.append(event)
        if event.done > 100_000:
            cancel.set()

    with pytest.raises(DownloadError, match=f"of {FILE} was cancelled; .* are kept"):
        fetch(on_event=on_event, cancelled=cancel.is_set)
    assert seen[-1].phase == "downloading" and parts(tmp_path)
    with pytest.raises(DownloadError, match="cancelled"):
        fetch(cancelled=lambda: True)
    assert fetch().read_bytes() == DATA


def test_a_slow_hub_shows_its_speed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds() -> float:
        """As if a second brought 800 kB."""
        return sum(part.stat().st_size for part in parts(tmp_path)) / 8e5

    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=seconds))
    seen: list[DownloadEvent] = []
    fetch(on_event=seen.append)
    moving = [e for e in seen if e.phase == "downloading"]
    assert 3 < len(moving) < 20, "ten a second"
    assert 1e5 < moving[-1].speed < 2e6 and "MB/s" in str(moving[-1])


def test_without_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "models"
    here, there = fetch(), fetch(models_dir=folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_session()
    hub.requests.clear()
    for name in (f"org/m:{FILE}", "org/m:Q4_K_M", "org/m", "org/m@main:Q4_K_M"):
        assert fetch(name) == here and fetch(name, models_dir=folder) == there
    with pytest.raises(ModelNotFoundError, match="not on this machine, and HF_HUB_OFFLINE forbids"):
        fetch("org/m:Q8_0")
    assert not hub.requests
    forget_session()


def test_one_download_at_a_time(hub: Hub, tmp_path: Path) -> None:
    """Two threads here and another process: the hub sends the file once."""
    waited = hub.held = threading.Event()  # until then the hub does not send all of it

    def on_event(event: DownloadEvent) -> None:
        if event.phase == "waiting":
            waited.set()

    code = f"from llmkit.models.download import download; print(download('org/m:{FILE}').path)"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(on_event=on_event))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, **settings},
    )  # fmt: skip
    for thread in threads:
        thread.join()
    assert other.stdout.strip() == str(paths[0]) == str(paths[1]), other.stderr
    assert len(hub.gets()) == 1 and waited.is_set() and paths[0].read_bytes() == DATA


@pytest.mark.parametrize(
    "name",
    ["", "x", "org/repo:", "org/repo:a.bin", "org/repo:latest", "org/repo:../a.gguf",
     "../..:a.gguf", "org/..:a.gguf", "org/re--po:a.gguf", "org/repo@../../x:a.gguf",
     "org/repo:/etc/a.gguf", "org/repo:a\nb.gguf", "org/repo:a\0.gguf", "a/b/c:d.gguf",
     "-x/y:a.gguf", "org/repo:a//b.gguf", "C:/x.gguf", "/a/b.gguf",
     "org/repo:" + "a" * 5000 + ".gguf"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        HubName.parse(name)
    assert not is_hub_name(name)


def test_names_that_are() -> None:
    assert is_hub_name("org/repo:file.gguf") and is_hub_name("o/r:sub/größe (1) Q4.gguf")
    assert is_hub_name("org/repo:UD-Q4_K_XL") and not is_hub_name("org/repo")
    assert str(HubName.parse("org/repo@refs/pr/1:q8_0")) == "org/repo@refs/pr/1:Q8_0"


def test_the_command_and_python(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "pull", "org/m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == f"org/m:{FILE}" and Path(told["path"]).read_bytes() == DATA
    assert main(["models", "pull", "org/m", "--models-dir", str(tmp_path / "models")]) == 0
    out = capsys.readouterr()
    assert out.out.strip() == str(tmp_path / "models" / "org" / "m" / FILE)
    assert f"took org/m:{FILE}" in out.err
    assert main(["models", "pull", "org/m:Q3_K_M"]) == 1
    assert "has no Q3_K_M; it has" in capsys.readouterr().err
    assert main(["models", "pull", "nonsense"]) == 1
    assert llmkit.download("org/m:Q8_0").read_bytes() == OTHER
    assert llmkit.download("org/m", models_dir=str(tmp_path / "o")).is_relative_to(tmp_path / "o")
    assert main(["models", "rm", "org/m:m-Q8_0.gguf", "--yes"]) == 0
    assert not any(m.id.endswith("Q8_0.gguf") for m in Library(None).models())


def test_what_the_hub_has_may_be_no_model(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is right, but nothing could load it; nothing of it is kept."""
    hub.content["org/m"][FILE] = b"<!DOCTYPE html>" * 9
    for where in (None, tmp_path / "models"):
        with pytest.raises(DownloadError, match=f"{FILE} .* looks like an HTML page. It was"):
            fetch(models_dir=where)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"html" in p.read_bytes()[:99]]
    assert main(["models", "pull", f"org/m:{FILE}"]) == 1
    assert "choose another file" in capsys.readouterr().err


def test_the_rest_of_what_is_no_model_is_not_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.content["org/m"][FILE] = b"<!DOCTYPE html>" * 99_999
    hub.held = threading.Event()  # the rest never comes
    try:
        with pytest.raises(DownloadError, match=f"{FILE} cannot be used: what the Hub sends looks"):
            fetch()
    finally:
        hub.held.set()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"html" in p.read_bytes()[:99]]


def test_a_file_of_the_right_size_may_be_damaged(hub: Hub) -> None:
    """As after a power failure: it is fetched again, and without the Hub it is not there."""
    path = fetch()
    path.resolve().write_bytes(bytes(len(DATA)))
    hub.statuses = [503] * 99
    with pytest.raises(LLMKitError):
        fetch()
    hub.statuses = []
    assert fetch().read_bytes() == DATA
