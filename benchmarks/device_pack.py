"""What a GPU machine without a network needs: sources, wheels, a vocabulary."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from device_words import (
    MIB,
    ROOT,
)

PACKAGE = "llama-cpp-python"
CARRY_LIMIT = 64 * MIB
# Of vendor/llama.cpp; everything else (models, docs, tests, other devices) stays behind.
KEPT = ("CMakeLists.txt", "LICENSE", "cmake/", "common/", "include/", "src/", "vendor/", "tools/")
KEPT += ("ggml/", "licenses/", "scripts/ui-assets.cmake", "scripts/build-info")
BACKENDS = ("cann", "et", "hexagon", "metal", "musa", "opencl", "openvino", "rpc", "sycl")
BACKENDS += ("virtgpu", "vulkan", "webgpu", "zdnn", "zendnn")
DROPPED = re.compile(
    r"^(tools/ui/(src|static|tests|scripts|\.storybook|package-lock)|tools/mtmd/(test|tests)"
    r"|tools/server/(tests|bench|public)|ggml/src/ggml-(" + "|".join(BACKENDS) + r")/)"
    r"|\.(jpe?g|png|mp3|wav|md)$"
)
# What llmkit imports in these checks. NumPy is expected on the GPU machine (its wheel is large).
WHEELS = ("msgspec", "psutil", "pyzmq", "typer", "rich", "platformdirs", "filelock", "gguf")
WHEELS += ("docstring-parser", "jinja2", "llguidance", "diskcache", "pydantic", "jsonschema")
WHEELS += ("pydantic-settings", "jupyter_core", "typing-extensions")
NOT_CARRIED = {"numpy"}


def pinned() -> str:
    """The version of llama-cpp-python that .ci/constraints.txt pins."""
    found = re.search(
        r"^llama[_-]cpp[_-]python==(\S+)", (ROOT / ".ci" / "constraints.txt").read_text(), re.M
    )
    if found is None:
        raise SystemExit(f".ci/constraints.txt pins no {PACKAGE}.")
    return found[1]


def kept(name: str) -> bool:
    """Whether the build needs a file of the sdist (its path without the first folder)."""
    if name.startswith("llama_cpp/") and name.endswith((".py", "py.typed")):
        return True
    inner = name.removeprefix("vendor/llama.cpp/")
    return inner != name and inner.startswith(KEPT) and not DROPPED.search(inner)


def pack(args: argparse.Namespace) -> int:
    """Collect sources, wheels and vocabulary in ``--sources``."""
    args.sources.mkdir(parents=True, exist_ok=True)
    version, pip = pinned(), [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        archive = args.sdist
        if archive is None:
            command = [*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={version}", "-d", folder]
            subprocess.run(command, check=True)
            archive = next(Path(folder).glob("*.tar.gz"))
        target = args.sources / f"llama_cpp_python-{version}-trimmed.tar.gz"
        with tarfile.open(archive) as whole, tarfile.open(target, "w:gz", compresslevel=9) as part:
            for member in whole:
                if member.isfile() and kept(member.name.partition("/")[2]):
                    part.addfile(member, whole.extractfile(member))
    pack_wheels(args.sources / "wheels", args.python, pip)
    pack_vocabulary(args.sources / "vocabulary.json.gz", args.model)
    size = sum(f.stat().st_size for f in args.sources.rglob("*") if f.is_file())
    print(f"{args.sources}: {size / MIB:.1f} MiB (a device run carries at most 64 MiB in all)")
    return int(size > CARRY_LIMIT)


def pack_wheels(folder: Path, python: str, pip: list[str]) -> None:
    """Wheels of what llmkit imports here, for the GPU machine's Python, in the pinned versions."""
    shutil.rmtree(folder, ignore_errors=True)
    names = sorted(closure(WHEELS) - NOT_CARRIED)
    pins = {}
    for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        pins[plain(name)] = version.strip()
    tags = [f"manylinux_2_{n}_x86_64" for n in (39, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    command = [*pip, "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for tag in tags:
        command += ["--platform", tag]
    wanted = [f"{n}=={pins[n]}" if pins.get(n) else n for n in names]
    subprocess.run([*command, "-d", str(folder), *wanted], check=True)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions and what they need, as installed here."""
    import importlib.metadata as metadata

    found: set[str] = set()
    todo = [plain(n) for n in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # another platform's
        found.add(name)
        for need in needs:
            spec, _, marker = need.partition(";")
            if not re.search(r"extra\s*==|win32|Windows|emscripten|Darwin", marker):
                todo.append(plain(re.split(r"[\s\[<>=!~(]", spec.strip(), maxsplit=1)[0]))
    return found


def pack_vocabulary(target: Path, model: str) -> None:
    """The tokenizer of ``model``: real text needs real tokens, speed needs no real weights."""
    import gguf

    sys.path.insert(0, str(ROOT))
    from llmkit.models.registry import resolve

    fields = gguf.GGUFReader(resolve(model).path).fields
    facts = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    target.write_bytes(gzip.compress(json.dumps(facts, default=int).encode(), mtime=0))
