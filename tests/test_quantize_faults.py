"""Quantizing that fails: a child that crashes or is stopped, two who want the same, full disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from fakes import wait_for
from tiny_models import leftovers

from llmkit.bridge.child import Owner
from llmkit.errors import InvalidModelFileError, InvalidRequestError, ModelLoadError
from llmkit.models.copies import copies_of
from llmkit.models.registry import ModelSpec, resolve
from llmkit.runtime import quantizing
from llmkit.runtime.quantizing import Quantized, quantized

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("own_cache")]


def test_what_is_no_model(tmp_path: Path, tiny: ModelSpec) -> None:
    adapter = tiny_models.write_lora(tmp_path / "lora.gguf")
    with pytest.raises(InvalidRequestError, match="not a model but 'adapter'"):
        quantized(resolve(adapter), "Q8_0")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.path.read_bytes()[:-1000])
    with pytest.raises(InvalidModelFileError, match="truncated"):
        quantized(resolve(broken), "Q8_0")
    odd = bytearray(tiny.path.read_bytes())
    at = odd.index(b"llama")
    odd[at : at + 5] = b"lxama"  # no architecture of that name
    broken.write_bytes(odd)
    with pytest.raises(ModelLoadError, match="lxama"):
        quantized(resolve(broken), "Q8_0")
    assert not leftovers(tmp_path)


def crash(owner: Owner) -> None:
    """In place of the quantizer: an assert in C."""
    Path(owner.task["part"]).write_bytes(b"half a file")
    print("GGML_ASSERT(false) failed", file=sys.stderr, flush=True)
    os.abort()


def rubbish(owner: Owner) -> None:
    Path(owner.task["part"]).write_bytes(b"GGUF, but not really")
    owner.ready(bits=1, num_fallbacks=0, num_tensors=1)


@pytest.mark.parametrize(
    ("target", "words"),
    [("crash", r"SIGABRT\. GGML_ASSERT"), ("rubbish", "damaged"), ("none", "could not be loaded")],
)
def test_a_child_that_fails(
    target: str, words: str, tiny: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "TARGET", f"test_quantize_faults:{target}")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    with pytest.raises(ModelLoadError, match=words):
        quantized(tiny, "Q8_0")
    assert not leftovers(tmp_path) and not copies_of([tiny.path])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert quantized(tiny, "Q8_0").made


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_large(tmp_path_factory.mktemp("large") / "large.gguf")


def test_it_can_be_stopped(large: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    stop = threading.Event()
    began = time.monotonic()
    with pytest.raises(ModelLoadError, match="was cancelled; no file is left"):
        quantized(
            resolve(large), "Q2_K", target=target, on_progress=lambda s: stop.set(),
            cancelled=stop.is_set,
        )  # fmt: skip

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(resolve(large), "Q2_K", target=target, on_progress=interrupt)
    assert time.monotonic() - began < 30 and not list(tmp_path.rglob("*.gguf"))
    assert not leftovers(tmp_path)


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_process_that_is_killed_leaves_no_child(large: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmkit.models.registry import resolve\n"
        "from llmkit.runtime.quantizing import quantized\n"
        "quantized(resolve(sys.argv[1]), 'Q2_K', target=Path(sys.argv[2]))"
    )
    target = tmp_path / "out.gguf"
    parent = subprocess.Popen([sys.executable, "-c", code, str(large), str(target)])
    end = time.monotonic() + 60
    while not leftovers(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    (part,) = leftovers(tmp_path)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(lives, family)))
    size = part.stat().st_size
    time.sleep(0.5)
    assert part.stat().st_size == size, "nobody writes it any more"
    done = quantized(
        resolve(tiny_models.write(tmp_path / "t.gguf", "llama")), "Q8_0", target=target
    )
    assert done.path == target and not leftovers(tmp_path), "the next try clears it away"


def test_two_want_the_same(
    tiny: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, real = [], quantizing._run

    def slowly(*given: Any) -> dict[str, Any]:
        runs.append(given)
        time.sleep(0.5)
        return real(*given)

    monkeypatch.setattr(quantizing, "_run", slowly)
    done: list[Quantized] = []
    threads = [
        threading.Thread(target=lambda: done.append(quantized(tiny, "Q8_0"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1 and len({d.path for d in done}) == 1 and len(done) == 3


def test_the_disk_is_looked_at_first(
    tiny: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=1 << 20))
    with pytest.raises(ModelLoadError, match=r"no place for .* has 1\.05 MB free, and 67"):
        quantized(tiny, "Q8_0")
    assert not leftovers(tmp_path)


FULL = """
import resource, sys
from pathlib import Path
from llmkit.models.registry import resolve
from llmkit.runtime.quantizing import quantized
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: quantized(resolve(sys.argv[1]), "Q8_0")
except Exception as error: print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_file_that_cannot_grow(tiny: ModelSpec, tmp_path: Path) -> None:
    """A write that fails in C is an error here, and leaves nothing."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tiny.path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("ModelLoadError"), done
    assert not leftovers(tmp_path) and not copies_of([tiny.path])


def test_a_disk_that_fills(
    tiny: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system, large enough until somebody else fills it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        target = folder / "out.gguf"
        assert quantized(tiny, "Q8_0", target=target).made
        target.unlink()
        real = quantizing._run

        def fill(*given: Any) -> dict[str, Any]:
            with (folder / "other").open("wb") as other:
                other.write(bytes(shutil.disk_usage(folder).free - 100_000))
            return real(*given)

        monkeypatch.setattr(quantizing, "_run", fill)
        with pytest.raises(ModelLoadError, match="no room for the quantized copy"):
            quantized(tiny, "Q8_0", target=target)
        (folder / "other").unlink()
        monkeypatch.setattr(quantizing, "TARGET", "test_quantize_faults:careless")
        monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
        with pytest.raises(ModelLoadError, match="the disk is full: the quantized copy of tiny"):
            quantized(tiny, "Q8_0", target=target)
        assert os.listdir(folder) == ["other"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def careless(owner: Owner) -> None:
    """The child that finds room when it looks, and none when it writes."""
    looks = iter(["", "full"])
    quantizing.lack_of_room = lambda *_: next(looks)  # type: ignore[assignment]
    quantizing.child(owner)
