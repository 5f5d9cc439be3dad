"""Downloads that fail: cut, slow, damaged, refused or hostile answers, full disks, and a kill."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import wait_for
from loopback_hub import DATA, FILE, OTHER, Hub, fetch, parts, serving

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.models import disk, download, repositories, transfer
from llmkit.models import hub as hub_names


def test_a_damaged_beginning_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after, transfer_tries = [300_000], transfer.TRIES
    assert transfer_tries > 1
    stop = iter([False] * 3 + [True] * 99)
    with pytest.raises(DownloadError, match="cancelled"):
        fetch(cancelled=lambda: next(stop))
    (part,) = parts(tmp_path)
    part.write_bytes(b"GGUF" + b"x" * part.stat().st_size)
    hub.requests.clear()
    assert fetch().read_bytes() == DATA
    assert len(hub.gets()) == 2, "the rest, then all of it"
    part.write_bytes(b"x" * 300_000)
    Path(part.with_suffix("")).unlink()
    hub.requests.clear()
    assert fetch().read_bytes() == DATA
    assert len(hub.gets()) == 1, "nobody needs the rest to see it"
    part.write_bytes(b"x" * (len(DATA) + 5))
    Path(part.with_suffix("")).unlink()
    assert fetch().read_bytes() == DATA, "one that is too long is of another file"


@pytest.mark.parametrize("by_git", [False, True])
def test_a_wrong_checksum_leaves_nothing(hub: Hub, tmp_path: Path, by_git: bool) -> None:
    hub.by_git, hub.damage = by_git, 1
    with pytest.raises(DownloadError, match="another checksum than the Hub says"):
        fetch()
    assert not parts(tmp_path) and not list(tmp_path.rglob(FILE))
    assert fetch().read_bytes() == DATA


def test_a_hub_that_stalls_is_asked_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.held = threading.Event()
    assert fetch().read_bytes() == DATA
    assert len(hub.gets()) > 1
    hub.held.set()


def test_a_hub_that_names_no_time_to_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.01)
    hub.statuses, hub.retry_after = [503], "\u00b2"
    assert fetch().is_file()


def test_busy_hubs_are_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.statuses = [503, 429, 500]
    assert fetch().read_bytes() == DATA
    monkeypatch.setattr(transfer, "TRIES", 2)
    hub.statuses = [503] * 9
    with pytest.raises(DownloadError, match="status 503"):
        fetch("org/m:Q8_0")
    hub.statuses = [403]
    with pytest.raises(DownloadError, match=r"status 403.*HF_TOKEN"):
        fetch("org/m:Q8_0")
    hub.statuses = [416]
    assert fetch("org/m:Q8_0").read_bytes() == OTHER


def test_a_redirect_does_not_get_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    elsewhere = Hub(hub.content)
    with serving(elsewhere):
        hub.cdn = elsewhere.url
        hub.cut_after = []
        elsewhere.cut_after = [100_000]
        assert fetch().read_bytes() == DATA
        assert len(elsewhere.gets("/cdn/")) == 2
        assert not any("Authorization" in h for h in elsewhere.gets("/cdn/"))
        assert all(h["Authorization"] == "Bearer hf_secret" for h in hub.gets())


def test_who_may_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("gated/m")
    with pytest.raises(ModelNotFoundError, match="accept its terms"):
        fetch("gated/m:x.gguf")
    with pytest.raises(ModelNotFoundError, match="no repository org/none"):
        fetch("org/none:Q4_K_M")
    hub.token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelNotFoundError, match="check the token"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "right")
    path = fetch()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert fetch() == path, "what is here may be used"


def test_a_process_that_is_killed_loses_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.held = threading.Event()
    code = f"from llmkit.models.download import download; print(download('org/m:{FILE}').path)"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **settings})
    wait_for(lambda: any(p.stat().st_size > 50_000 for p in parts(tmp_path)), 60)
    child.kill()
    child.wait()
    (part,) = parts(tmp_path)
    kept = part.stat().st_size
    hub.held.set()
    hub.held = None
    hub.requests.clear()
    assert fetch().read_bytes() == DATA and 0 < kept < len(DATA)
    assert [h.get("Range") for h in hub.gets()] == [f"bytes={kept}-"]


def test_the_disk_is_looked_at_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    free = [len(DATA) + (1 << 20)]
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=free[0]))
    with pytest.raises(DownloadError, match=r"has 1\.65 MB free, and 67\.7 MB are needed"):
        fetch()
    assert not hub.gets() and not parts(tmp_path)
    free[0] = len(DATA) + (65 << 20)
    assert fetch().read_bytes() == DATA
    free[0] = 0
    assert fetch().read_bytes() == DATA, "nothing to fetch, nothing needed"


FULL = """
import resource, signal, sys
from llmkit.models import disk
from llmkit.models.download import download
resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))
try: download(sys.argv[1])
except Exception as error: print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_that_fills_midway(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    settings |= {"HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, f"org/m:{FILE}"], capture_output=True, text=True,
        timeout=60, env={**os.environ, **settings},
    )  # fmt: skip
    (part,) = parts(tmp_path)
    assert done.stdout.startswith("DownloadError the disk is full: 0.25 MB of 0.6 MB"), done
    assert str(part) in done.stdout and part.read_bytes() == DATA[:250_000]
    hub.requests.clear()
    assert fetch().read_bytes() == DATA
    assert [h.get("Range") for h in hub.gets()] == ["bytes=250000-"]


def test_a_full_disk_is_told_from_other_faults() -> None:
    assert disk.is_full(OSError(errno.ENOSPC, "")) and disk.is_full(OSError(errno.EDQUOT, ""))
    assert not disk.is_full(OSError(errno.EIO, ""))


def test_folders_that_cannot_be_used(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch(models_dir=tmp_path / "file")
    folder, outside = tmp_path / "models", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "org").symlink_to(outside)
    with pytest.raises(DownloadError, match="leads out of"):
        fetch(models_dir=folder)
    assert not list(outside.rglob("*.gguf"))


@pytest.mark.parametrize(
    "etag", ["../../../evil", "", "a b", "x" * 300, "..", "W/" + "a" * 64 + "/../x"]
)
def test_a_hostile_hub_writes_nowhere_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str
) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    found = SimpleNamespace(commit_hash="../..", etag=etag, size=10)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_: found)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ModelNotFoundError, match=r"makes no sense|does not say"):
        fetch()
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["../m/", "a/../../m/", "/", "a//", "..\\", "a\n", "\x1b[2J"])
def test_a_hub_that_lists_what_is_no_path(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add("org/evil", **{f"{name}{FILE}": DATA, "config.json": b"{}", f"{name}a.json": b"{}"})
    assert hub_names.files_of(hub_names.HubName("org/evil")) == {}
    with pytest.raises(ModelNotFoundError, match="has no GGUF model"):
        fetch("org/evil", models_dir=tmp_path / "models")
    assert not (tmp_path / "models").exists()
    assert repositories._listing(hub_names.HubName("org/evil"))[1] == ["config.json"]


def test_a_hub_that_sends_too_much(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hub_names.about
    from dataclasses import replace

    monkeypatch.setattr(hub_names, "about", lambda *a: replace(real(*a), size=1000))
    with pytest.raises(DownloadError, match="sends more"):
        fetch()


def test_files_that_only_xet_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_HTTP_BYTES", 1000)
    with pytest.raises(DownloadError, match=f"hf download org/m {FILE}"):
        fetch()
