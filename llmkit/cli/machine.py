"""What `llmkit doctor` looks at in the machine: processor, memory, GPUs, llama.cpp, disks, limits.

Nothing here needs llama.cpp: it is asked in a process of its own, which may crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmkit.backend.advice import backend_of, faster
from llmkit.cli.findings import Finding
from llmkit.system import resources
from llmkit.system.accelerators import accelerators
from llmkit.system.endings import signal_name
from llmkit.system.process import python_path

__all__ = ["Llama", "ask_llama", "disks", "gpus", "llama", "memory", "open_limits", "processor",
           "versions"]  # fmt: skip

GIB, MIB = 1 << 30, 1 << 20
PATIENCE_S = 60.0
ASK = """
import json, sys
try:
    from llmkit.backend import amx, library
except ModuleNotFoundError as error:
    print(json.dumps({"missing": str(error)}))
    sys.exit()
print(json.dumps({
    "version": library.version(),
    "backends": library.backends(),
    "gpus": [list(gpu) for gpu in library.gpus()],
    "features": library.C.llama_print_system_info().decode(),
    "avoided": ["AMX_INT8"] if amx.amx_is_broken() else [],
}))
"""
PACKAGES = ("llama-cpp-python", "jupyter-server", "jupyterlab", "tornado", "pyzmq")


@dataclass(frozen=True, slots=True)
class Llama:
    """What llama.cpp said of itself; or why it said nothing, which may only be that it is not
    installed."""

    version: str = ""
    backends: list[str] = field(default_factory=list)
    gpus: list[tuple[str, str, int, int]] = field(default_factory=list)  # name, what, free, total
    features: set[str] = field(default_factory=set)
    missing: bool = False
    fault: str = ""


def ask_llama() -> Llama:
    """Ask in a child: a build for another processor ends it, and CUDA takes memory."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Llama(fault=f"it does not answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return Llama(fault=f"no process could be started: {error.strerror}")
    if done.returncode < 0:
        name = signal_name(-done.returncode)
        why = " (built for another processor)" if name == "SIGILL" else ""
        return Llama(fault=f"loading it ends with {name}{why}")
    try:
        return _said(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        return Llama(fault=f"loading it fails: {lines[-1]:.300}")


def _said(said: dict[str, Any]) -> Llama:
    if "missing" in said:
        is_it = "llama_cpp" in said["missing"]
        return Llama(missing=is_it, fault=said["missing"])
    built = {
        part.split("=")[0].split(":")[-1].strip()
        for part in said["features"].split("|")
        if part.strip().endswith("= 1")
    } - set(said["avoided"])
    found = [(g[0], g[1], g[3], g[4]) for g in said["gpus"]]
    return Llama(said["version"], said["backends"], found, built)


def versions() -> Iterator[Finding]:
    from llmkit.version import __version__

    known = [f"llmkit {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            known.append(f"{package} {version(package)}")
    yield Finding("versions", "ok", ", ".join(known))
    system = platform.platform(terse=True)
    yield Finding("system", "ok", f"{system}, {platform.machine()}, {sys.executable}")


def processor(root: Path = Path("/")) -> Iterator[Finding]:
    usable, there = resources.usable_cores(root), os.cpu_count() or 1
    features = resources.cpu_features(root)
    names = ", ".join(resources.FEATURES[name] for name in features)
    text = f"{resources.cpu_name(root)}: {usable} of {there} cores usable"
    text += f"; {names}" if names else ""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and features and "avx2" not in features:
        advice = "without AVX2 llama.cpp is several times slower; use another machine if you can"
        yield Finding("processor", "warn", text, advice)
    elif usable == 1:
        advice = "a busy cell and the model share one core; give the container two or more"
        yield Finding("processor", "warn", text, advice)
    else:
        yield Finding("processor", "ok", text)


def memory(root: Path = Path("/")) -> Iterator[Finding]:
    import psutil

    from llmkit.models.memory import free_ram

    free, total = free_ram(), int(psutil.virtual_memory().total)
    text = f"{free / GIB:.1f} GiB free for this process, of {total / GIB:.1f}"
    group = resources.group_memory(root)
    if group is not None:
        text += f"; its control group may take {group.limit / GIB:.1f}"
    if os.environ.get("MEM_LIMIT"):
        text += f"; MEM_LIMIT={os.environ['MEM_LIMIT']:.20}"
    advice = "close other notebooks, or load a smaller quantization (quantize='Q4_K_M')"
    if free < 256 * MIB:
        yield Finding("memory", "bad", text, f"not even a small model fits: {advice}")
    elif free < 2 * GIB:
        yield Finding("memory", "warn", text, f"only small models fit: {advice}")
    else:
        yield Finding("memory", "ok", text)
    address_space = resources.limits().get("memory", (None, None))[0]
    if address_space is not None:
        yield Finding(
            "memory limit",
            "warn",
            f"ulimit -v allows {address_space / GIB:.1f} GiB of addresses",
            "model files are mapped and count in full; raise it, or limit by a control group",
        )


def gpus(known: Llama, root: Path = Path("/")) -> Iterator[Finding]:
    """Each GPU that llama.cpp can use, and those that it cannot."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield Finding("CUDA_VISIBLE_DEVICES", "ok", visible or "empty: no NVIDIA GPU is visible")
    for name, what, free, total in known.gpus:
        text = f"{what}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < total // 10:
            advice = "other programs hold its memory: see nvidia-smi, or choose another GPU"
            yield Finding(f"GPU {name}", "warn", text, advice)
        else:
            yield Finding(f"GPU {name}", "ok", text)
    if known.gpus:
        return
    present = accelerators(root)
    for gpu in present:
        yield Finding("GPU", "warn", f"{gpu.name}; not used by llama.cpp, see below")
    if not present:
        yield Finding("GPU", "none", "none; models run on the processor")


def llama(known: Llama, root: Path = Path("/")) -> Iterator[Finding]:
    """The backend in use, and what would be faster."""
    if known.missing:
        yield Finding(
            "llama.cpp",
            "warn",
            "not installed: this environment can serve and attach to models of other processes, "
            "but load none",
            "to load models: pip install llama-cpp-python, or make setup in a checkout",
        )
        return
    if known.fault:
        advice = "build it again, for this machine: run `make cpu` in a checkout of llmkit, or\n"
        advice += "    pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python"
        yield Finding("llama.cpp", "bad", known.fault, advice)
        return
    used = ", ".join(name for name, *_ in known.gpus) or "CPU"
    text = f"{known.version}, built for {', '.join(known.backends)}; uses {used}"
    better = faster(known.backends, [name for name, *_ in known.gpus], accelerators(root))
    unused = _unused_features(known, root)
    if better:
        yield Finding("llama.cpp", "warn", text, f"faster: {better}")
    elif unused and backend_of(used) == "cpu":
        advice = (
            f"this processor also has {', '.join(unused)}, which this build does not use: "
            "build it here, with `make cpu` in a checkout, or\n"
            "    pip install --force-reinstall --no-cache-dir --no-binary :all: --no-deps "
            "llama-cpp-python"
        )
        if "AMX_INT8" in unused:
            advice += "\n    AMX needs clang, or a GCC that compiles it correctly: "
            advice += "11.5, 12.4, 13.3, or 14 on"
        yield Finding("llama.cpp", "warn", text, f"faster: {advice}")
    else:
        yield Finding("llama.cpp", "ok", f"{text}; nothing faster is known for this machine")


def _unused_features(known: Llama, root: Path) -> list[str]:
    names = [resources.FEATURES[name] for name in resources.cpu_features(root)]
    # Nothing is known of a build that names none of them.
    return [name for name in names if known.features and name not in known.features]


def open_limits(root: Path = Path("/")) -> Iterator[Finding]:
    known = resources.limits()
    if "files" in known:
        soft, hard = known["files"]
        text = f"{_number(soft)} open files, may be raised to {_number(hard)}"
        if hard is not None and hard < 1024:
            advice = "a gateway needs one for each connection: ulimit -n 65536, or LimitNOFILE="
            yield Finding("open files", "warn", text, advice)
        else:
            yield Finding("open files", "ok", text)
    if "processes" in known:
        soft = known["processes"][0]
        if soft is not None and soft < 256:
            advice = "threads count as well: raise ulimit -u, or TasksMax= of the service"
            yield Finding("processes", "warn", f"{soft} at most", advice)
    if "locked" in known:
        soft = known["locked"][0]
        text = "no limit" if soft is None else f"{soft / MIB:.0f} MiB"
        yield Finding("locked memory", "ok", f"{text}; llmkit locks none")
    shm = root / "dev/shm"
    if shm.is_dir():
        with contextlib.suppress(OSError):
            _, free = resources.free_disk(shm)
            yield Finding("/dev/shm", "ok", f"{free / MIB:,.0f} MiB free; llmkit uses none")


def _number(value: int | None) -> str:
    return "without limit" if value is None else f"{value:,}"


def disks() -> Iterator[Finding]:
    """The room where models, their copies and downloads are kept."""
    import tempfile

    from llmkit.models.registry import cache_folder
    from llmkit.models.scanning import hub_cache

    places = {
        "cache": cache_folder(),
        "downloads": hub_cache(),
        "temporary files": Path(tempfile.gettempdir()),
    }
    for name, path in places.items():
        try:
            folder, free = resources.free_disk(path)
        except OSError as error:
            yield Finding(f"disk: {name}", "bad", f"{path}: {error.strerror or error}")
            continue
        text = f"{free / GIB:.1f} GiB free in {path}"
        if not os.access(folder, os.W_OK | os.X_OK):
            advice = f"{folder} is not writable for you; set XDG_CACHE_HOME, HF_HOME or TMPDIR"
            yield Finding(f"disk: {name}", "bad", text, advice)
        elif free < 200 * MIB:
            yield Finding(f"disk: {name}", "bad", text, "make room, or move it to another disk")
        elif free < 5 * GIB:
            yield Finding(f"disk: {name}", "warn", text, "most models will not fit")
        else:
            yield Finding(f"disk: {name}", "ok", text)
