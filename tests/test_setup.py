"""`make cpu | cuda | metal | vulkan`: what pip is told, and which missing tool is named.

Nothing is compiled: the tools on the path are stubs, and so is the environment's Python.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="setup is a bash script")
TOOLS = ("bash", "cat", "cksum", "cut", "dirname", "rm", "touch")
STUB = "#!/bin/sh\nexit 0\n"
# Tells what pip is told, and with which flags and cache.
PYTHON = """#!/bin/sh
case "$*" in
  *"cache dir") echo /somewhere/pip ;;
  *"install"*) echo "[$CMAKE_ARGS] [$PIP_CACHE_DIR] [$CXXFLAGS] $*" >> "$LOG" ;;
  *"cache remove"*) echo "$*" >> "$LOG" ;;
esac
"""


class Machine:
    def __init__(self, folder: Path, system: str = "Linux", machine: str = "x86_64") -> None:
        self.bin, self.venv, self.log = folder / "bin", folder / "venv", folder / "log"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        for tool in ("cmake", "cc", "c++"):
            self.has(tool)
        name = f'case "$1" in -sm) echo {system} {machine};; *) echo {system};; esac'
        self.has("uname", f"#!/bin/sh\n{name}\n")
        (self.venv / "bin").mkdir(parents=True)
        self._write(self.venv / "bin" / "python", PYTHON)

    def has(self, tool: str, text: str = STUB) -> None:
        self._write(self.bin / tool, text)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def works(self, backend: str | None = None) -> list[str]:
        """What pip was told of llama.cpp."""
        done = self.setup(backend)
        assert done.returncode == 0, done.stderr
        return self.built

    def setup(self, backend: str | None = None) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        env = {
            "PATH": str(self.bin),
            "VENV": str(self.venv),
            "PYTHON": sys.executable,
            "LOG": str(self.log),
            "HOME": str(self.venv),
            "CUDA_HOME": "/nowhere",
        }
        return subprocess.run(
            [str(self.bin / "bash"), str(ROOT / ".ci" / "setup")],
            env=env if backend is None else {**env, "LLMKIT_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def built(self) -> list[str]:
        """What pip was told of llama.cpp."""
        return [line for line in self.log.read_text().splitlines() if "llama-cpp-python" in line]


@pytest.mark.parametrize(
    "backend, tools, flag",
    [("cuda", ["nvcc"], "-DGGML_CUDA=on"), ("vulkan", ["glslc"], "-DGGML_VULKAN=on")],
)
def test_a_backend_on_linux(tmp_path: Path, backend: str, tools: list[str], flag: str) -> None:
    machine = Machine(tmp_path)
    for tool in tools:
        machine.has(tool)
    done = machine.setup(backend)
    assert done.returncode == 0 and f"built for {backend}" in done.stderr, done.stderr
    (line,) = machine.built
    assert line.startswith(f"[ {flag}] [/somewhere/pip/../pip-llmkit-{backend}]")
    assert machine.works(backend) == []  # up to date


@pytest.mark.parametrize("backend, tool", [("cuda", "nvcc"), ("vulkan", "glslc")])
def test_a_missing_tool_is_named_at_once(tmp_path: Path, backend: str, tool: str) -> None:
    machine = Machine(tmp_path)
    done = machine.setup(backend)
    assert done.returncode == 1 and not machine.log.read_text()
    assert re.fullmatch(rf"llama\.cpp for {backend} needs {tool}\b.*: make cpu\n", done.stderr)


def test_vulkan_without_its_headers(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.has("glslc")
    machine.has("cc", "#!/bin/sh\nexit 1\n")
    done = machine.setup("vulkan")
    assert done.returncode == 1 and "vulkan/vulkan.h" in done.stderr and not machine.built


def test_metal_is_apples(tmp_path: Path) -> None:
    done = Machine(tmp_path).setup("metal")
    assert done.returncode == 1 and "needs macOS: this is Linux" in done.stderr


def test_on_apple_silicon_it_is_the_default(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "Darwin", "arm64")
    assert "needs xcrun" in machine.setup().stderr
    machine.has("xcrun")
    assert "-DGGML_METAL=on" in machine.works()[0]
    (line,) = machine.works("cpu")
    assert "-DGGML_METAL=off" in line and "--force-reinstall" in line


@pytest.mark.parametrize("backend", ["gpu", "CUDA", "cpu cuda", "../x"])
def test_an_unknown_backend(tmp_path: Path, backend: str) -> None:
    done = Machine(tmp_path).setup(backend)
    assert done.returncode == 1 and "cpu, cuda, metal or vulkan" in done.stderr


def test_what_was_asked_for_stays(tmp_path: Path) -> None:
    """`make test` after `make vulkan` does not build for the CPU again."""
    machine = Machine(tmp_path)
    machine.has("glslc")
    assert len(machine.works("vulkan")) == 1
    assert machine.works() == []
    (line,) = machine.works("auto")
    assert line.startswith("[] []") and "--force-reinstall --no-deps" in line
    assert machine.works() == []
