"""Weights on their way into memory, and llama-cpp-python without what nobody asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fakes import wait_for

from llmkit.backend import model as backend
from llmkit.backend.model import LlamaModel, Loading
from llmkit.models.registry import resolve

pytestmark = pytest.mark.model


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_own_classes_come_when_asked_for() -> None:
    code = """
import sys
from llmkit.backend import library
print("numpy" in sys.modules, "llama_cpp.llama" in sys.modules)
import llama_cpp
print(getattr(llama_cpp, "__warningregistry__", 0), "llama_cpp.llama" in sys.modules)
from llama_cpp import Llama
print(Llama.__name__, llama_cpp.__version__ == library.version(), llama_cpp.llama_cpp is library.C)
try:
    llama_cpp.nothing
except AttributeError as error:
    print(error)
"""
    assert run(code).splitlines() == [
        "False False",
        "0 False",
        "Llama True True",
        "module 'llama_cpp' has no attribute 'nothing'",
    ]


def test_any_thread_may_ask_first() -> None:
    code = """
import threading
from llmkit.backend import library
def ask():
    from llama_cpp import Llama
    found.append(Llama)
found = []
threads = [threading.Thread(target=ask) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found))
"""
    assert run(code) == "6\n"


def test_its_log_stays_ours() -> None:
    code = """
from pathlib import Path
from llmkit.backend import library
library.start()
import llama_cpp
llama_cpp.Llama
from llmkit.backend.model import LlamaModel
try:
    LlamaModel(Path("/nowhere.gguf"), n_gpu_layers=0)
except Exception as error:
    print("nowhere" in str(error), len(library.log.errors()) > 0)
"""
    assert run(code) == "True True\n"


def test_a_package_that_cannot_be_loaded_stays_so(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("")
    (tmp_path / "llama_cpp" / "llama_cpp.py").write_text("raise OSError('no such library')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for _ in range(2):
    try:
        import llmkit.backend.library
    except OSError as error:
        print(error, "llama_cpp" in sys.modules)
"""
    assert run(code) == "no such library False\n" * 2


def test_a_load_that_is_cancelled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once before its thread runs, once after."""
    loading = Loading(resolve("smollm2").path, n_gpu_layers=0)
    loading.cancel()
    loading.cancel()
    loading.start()
    assert loading.wait(lambda _: None) is None


def test_an_interrupt_before_anybody_waits_frees_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    freed: list[Any] = []
    real, free = backend.C.llama_model_load_from_file, backend.C.llama_model_free

    def load(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    def stop(self: Loading, on_progress: Any) -> None:
        assert self._ended.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend.C, "llama_model_load_from_file", load)
    monkeypatch.setattr(
        backend.C, "llama_model_free", lambda handle: (freed.append(handle), free(handle))
    )
    monkeypatch.setattr(Loading, "wait", stop)
    with pytest.raises(KeyboardInterrupt):
        LlamaModel(resolve("smollm2").path, n_gpu_layers=0)
    assert freed == made != []
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "llmkit-load"])
