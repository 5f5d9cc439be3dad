"""Fixtures that several files need. Servers listen on loopback, on free ports, and are stopped by
the fixture that started them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import tiny_models
from fake_runner import FakeRunner
from fakes import FakeClient
from gateway_client import Api, serve
from hypothesis import HealthCheck, settings
from jupyter_client_http import JupyterServer, Kernel
from loopback_hub import DATA, FILE, OTHER, Hub, serving, use

from llmkit.bridge.server import BridgeServer
from llmkit.models import transfer
from llmkit.models.registry import ModelSpec, resolve
from llmkit.runtime.local import LocalEngine
from llmkit.store.database import Database, open_database
from llmkit.store.keys import KeyStore

ROOT = Path(__file__).resolve().parents[1]
# Also for servers of a whole module: nothing is read from or left in the user's own folders.
_data = tempfile.TemporaryDirectory(prefix="llmkit-tests-", ignore_cleanup_errors=True)
os.environ["XDG_DATA_HOME"] = _data.name
# A run in the background of a script ignores SIGINT, and its children would: ■ would do nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on what else the machine does.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

MODEL = "smollm2"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """CI allows no skip."""
    _data.cleanup()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    if reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif session.exitstatus == pytest.ExitCode.TESTS_FAILED:
        whole = ROOT / ".pytest_cache" / "whole"  # all ran: .ci/run may try what failed again
        whole.parent.mkdir(exist_ok=True)
        whole.touch()


@pytest.fixture(autouse=True)
def private_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime and a data directory of the test's own: engines of other tests and the user's, and
    the user's database, are not seen."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv(
        "VIRTUAL_ENV", raising=False
    )  # another environment than ours may be active, of which IPython would warn
    for name in list(os.environ):
        # COLUMNS is pytest-xdist's: what tests start would wrap its lines there.
        if name.startswith("LLMKIT_") or name == "COLUMNS":
            monkeypatch.delenv(name)
    yield folder


@pytest.fixture
def fake() -> Iterator[FakeClient]:
    client = FakeClient()
    yield client
    client.close()


@pytest.fixture
def model() -> Iterator[FakeClient]:
    """A fake model behind a bridge, as a gateway finds it."""
    client = FakeClient(runner=FakeRunner(n_ctx=5000))
    bridge = BridgeServer(client)
    yield client
    bridge.close()
    client.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(f"sqlite:///{tmp_path}/llmkit.db")
    yield opened
    opened.close()


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


@pytest.fixture
async def api(model: FakeClient) -> AsyncIterator[Api]:
    """A gateway without a key in front of the fake model."""
    async for api in serve(None):
        yield api


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A Jupyter server for the tests of a module."""
    jupyter = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    yield jupyter
    jupyter.stop()


@pytest.fixture
def kernel(server: JupyterServer) -> Iterator[Kernel]:
    """A kernel of that server, for one test."""
    kernel = server.kernel()
    yield kernel
    kernel.close()
    server.request("DELETE", f"/api/kernels/{kernel.id}")


@pytest.fixture(scope="session")
def engine() -> Iterator[LocalEngine]:
    """The embedded model, in this process."""
    local = LocalEngine(MODEL, n_ctx=1024, n_slots=4)
    yield local
    local.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's chromium; skips loudly without it, but never in CI."""
    found = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not found:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing, and CI may not skip")
        pytest.skip("no chromium here: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSpec:
    """A tiny model in a folder of models."""
    folder = tmp_path / "models"
    folder.mkdir()
    return resolve(tiny_models.write(folder / "tiny.gguf", "llama"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, which this process's huggingface_hub asks."""
    made = Hub({"org/m": {FILE: DATA, "m-Q8_0.gguf": OTHER}})
    with serving(made):
        use(made.url, tmp_path / "hf", monkeypatch)
        monkeypatch.setattr(transfer, "FIRST_DELAY_S", 0.01)
        yield made
