"""The peer: llama-server, built once and kept in the user's cache.

Built from the same sources that the installed llama-cpp-python vendors.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
]


def llama_server() -> Path:
    """The path of llama-server; $LLAMA_SERVER, or one built on first use.

    Building takes about eleven minutes on two cores.
    """
    if os.environ.get("LLAMA_SERVER"):
        return Path(os.environ["LLAMA_SERVER"])
    version = importlib.metadata.version("llama-cpp-python")
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "llmkit"
        / f"peer-{version}"
    )
    binary = folder / "build" / "bin" / "llama-server"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"Building llama-server from llama-cpp-python {version}'s sources in {folder}: "
        "about eleven minutes on two cores.",
        file=sys.stderr,
    )
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
        f"llama-cpp-python=={version}",
        "-d",
        str(folder),
    ]
    subprocess.run(download, check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    subprocess.run(
        ["cmake", "-S", str(source), "-B", str(folder / "build"), *FLAGS],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(
        [
            "cmake",
            "--build",
            str(folder / "build"),
            "-j",
            str(os.cpu_count() or 1),
            "--target",
            "llama-server",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return binary
