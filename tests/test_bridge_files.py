"""The files by which engines are found: private, complete, and not trusted without reason."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runner import FakeRunner
from fakes import FakeClient

from llmkit.bridge import connection as files
from llmkit.bridge.server import BridgeServer
from llmkit.errors import ModelLoadError


@pytest.fixture
def slow() -> Iterator[FakeClient]:
    client = FakeClient(runner=FakeRunner(n_ctx=50_000, step_s=0.002))
    yield client
    client.close()


@pytest.fixture
def server(slow: FakeClient) -> Iterator[BridgeServer]:
    bridge = BridgeServer(slow)
    yield bridge
    bridge.close()


def test_a_folder_that_cannot_be_written_is_named(
    slow: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "file" / "runtime"))
    sockets = tmp_path / "s"
    sockets.mkdir()
    monkeypatch.setattr(files, "_socket_root", lambda: str(sockets))
    with pytest.raises(ModelLoadError, match=r"file/runtime cannot be written .*JUPYTER_RUNTIME"):
        BridgeServer(slow)
    assert not list(sockets.iterdir())


def test_the_file_is_private_and_complete(server: BridgeServer) -> None:
    path = server.connection.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    folder = Path(server.connection.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(server.connection.address.encode()) < 107
    assert files.find_connections() == [server.connection]
    assert "key" not in repr(server.connection)


def test_a_readable_or_linked_file_is_not_trusted(server: BridgeServer) -> None:
    path = server.connection.path
    path.chmod(0o640)
    assert files.find_connections() == [] and path.exists()
    path.chmod(0o600)
    moved = path.with_name("elsewhere.json")
    path.rename(moved)
    path.symlink_to(moved)
    assert files.find_connections() == []
    path.unlink()
    moved.rename(path)


def test_a_file_of_another_user_is_not_trusted(
    server: BridgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from the other side, so that no root is needed: the file is ours, and we are somebody
    else."""
    path, me = server.connection.path, os.getuid()
    monkeypatch.setattr("os.getuid", lambda: me + 1)
    assert files.find_connections() == [] and path.exists()
    monkeypatch.setattr("os.getuid", lambda: me)
    assert len(files.find_connections()) == 1


def rewrite(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_stale_files_are_removed_and_other_hosts_are_left_alone(server: BridgeServer) -> None:
    path = server.connection.path
    text = path.read_text()
    rewrite(path, host="another-host")
    assert files.find_connections() == [] and path.exists()
    rewrite(path, host=server.connection.host, pid_namespace="pid:[1]")
    assert files.find_connections() == [] and path.exists()
    path.write_text(text)
    rewrite(path, start_time=1.0)  # the pid was given to another process
    assert files.find_connections() == [] and not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 99}',
        '{"version": 1}',
        '{"version": 1, "model": {}}',
        "\xff" * 10,
    ],
)
def test_a_damaged_file_is_skipped(private_runtime: Path, text: str) -> None:
    path = private_runtime / "llmkit-1-bad.json"
    path.write_text(text)
    path.chmod(0o600)
    assert files.find_connections() == [] and path.exists()
