"""llama.cpp built with CUDA from the sources carried along, and a model made on the spot."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device_words import (
    MIB,
    Row,
    Skipped,
    mib,
    row,
    skipped,
)

FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
FLAGS += [f"-DLLAMA_{name}=OFF" for name in ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")]
FLAGS += [f"-DLLAMA_{name}=OFF" for name in ("BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI")]
FLAGS += ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]
FLAGS += ["-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON"]
SHAPE = {"embedding": 2048, "layers": 16, "feed_forward": 8192, "heads": 32, "kv_heads": 8}


def source_tree(sources: Path, work: Path) -> Path:
    """The unpacked sources: ``sources`` itself, or the archive in it. Raises `Skipped`."""
    if (sources / "vendor" / "llama.cpp").is_dir():
        return sources
    archives = sorted(sources.glob("llama_cpp_python-*.tar.gz"), key=lambda f: f.stat().st_mtime)
    if not archives:
        raise Skipped(f"no sources in {sources}: run device_check.py pack")
    name = archives[-1].name.removesuffix(".tar.gz").removesuffix("-trimmed")
    if not (work / name).is_dir():
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(work, filter="data")
    return work / name


def build(options: dict[str, Any]) -> Iterator[Row]:
    """llama-server and the libraries of llama-cpp-python, in one build; then `site`."""
    work = Path(options["work"])
    work.mkdir(parents=True, exist_ok=True)
    tree, begin = source_tree(Path(options["sources"]), work), time.monotonic()
    arch = options["arch"]
    if arch is not None:
        try:
            ok, last = configure(tree, work, cuda_flags(arch, work))
        except Skipped as why:
            ok, last = None, str(why)
        took = f"{time.monotonic() - begin:.0f} s {last}".strip()
        what, expected = f"sources configure (CUDA, sm_{arch})", "cmake succeeds"
        if ok is None and options["compile"]:
            yield row(what, expected, last, False)
            return
        yield skipped(what, expected, last) if ok is None else row(what, expected, took, ok)
        if ok is False:
            return
    else:
        yield skipped("sources configure (CUDA)", "cmake succeeds", "no nvcc here")
    if not options["compile"]:
        begin = time.monotonic()
        ok, last = configure(tree, work / "cpu", [])
        took = f"{time.monotonic() - begin:.0f} s {last}".strip()
        yield row("sources configure (CPU)", "cmake succeeds", took, ok)
        why = "dry run: nothing is compiled; the installed package is checked"
        yield skipped("compile", "one build for both arms", why)
        return
    begin = time.monotonic()
    log = work / "build.log"
    jobs = ["-j", str(os.cpu_count() or 1), "--target", "llama-server"]
    with log.open("wb") as out:
        told_code = subprocess.run(
            ["cmake", "--build", str(work / "build"), *jobs], stdout=out, stderr=out
        ).returncode
    ok = told_code == 0
    words = log.read_text(errors="replace").strip().splitlines()
    why = "" if ok else next((w for w in words if "error" in w.lower()), words[-1])[:200]
    yield row("compile", "one build for both arms", f"{time.monotonic() - begin:.0f} s {why}", ok)
    if ok:
        make_site(tree, work, Path(options["sources"]) / "wheels")


def configure(tree: Path, work: Path, flags: list[str]) -> tuple[bool, str]:
    """Run cmake; whether it succeeded, and what it complained about."""
    work.mkdir(parents=True, exist_ok=True)
    command = ["cmake", "-S", str(tree / "vendor" / "llama.cpp"), "-B", str(work / "build")]
    command += [*FLAGS, *flags, *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode == 0:
        return True, ""
    (work / "configure.log").write_text(told.stdout + told.stderr)
    errors = re.findall(r"CMake Error[^\n]*\n\s*([^\n]+)", told.stderr)
    return False, f"{(errors or ['no reason given'])[0][:160]}; see {work / 'configure.log'}"


def cuda_flags(arch: str, work: Path) -> list[str]:
    """For this architecture only, with cuBLAS and libcuda wherever they are.

    A toolkit may lack cuBLAS, which PyTorch's packages bring along, and libcuda's stub.
    """
    flags = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}", "-DGGML_CUDA_NCCL=OFF"]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Skipped("there is no nvcc on the PATH")
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", said)
    toolkit = Path(top[1]).resolve() if top else Path("/usr/local/cuda")
    libraries = [toolkit / "lib64", toolkit / "targets" / "x86_64-linux" / "lib"]
    if not any((folder / "libcublas.so").exists() for folder in libraries):
        flags += packaged_cublas(work)
    if not any((folder / "stubs" / "libcuda.so").exists() for folder in libraries):
        names = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
        known = [Path(name) for name in re.findall(r"libcuda\.so\.1 .*=> (\S+)", names)]
        folders = ["/usr/local/nvidia/lib64", *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
        known += [Path(folder) / "libcuda.so.1" for folder in folders if folder]
        driver = next((path for path in known if path.exists()), None)
        flags += [f"-DCUDA_cuda_driver_LIBRARY={driver}"] if driver else ["-DGGML_CUDA_NO_VMM=ON"]
    return flags


def packaged_cublas(work: Path) -> list[str]:
    """cuBLAS of a Python package, found beside any python3 here. Raises `Skipped`."""
    ask = "import sys, json; print(json.dumps(sys.path))"
    folders = [*os.environ.get("DEVICE_CUBLAS", "").split(":"), *sys.path]
    if (python := shutil.which("python3")) is not None:
        told = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout
        folders += json.loads(told or "[]")
    for folder in filter(None, folders):
        packages = sorted(Path(folder).glob("nvidia/cu[1-9]*"))
        for package in [*packages, Path(folder, "nvidia/cublas")]:
            library = next(iter(sorted(package.glob("lib/libcublas.so*"))), None)
            light = next(iter(sorted(package.glob("lib/libcublasLt.so*"))), None)
            if library and light and (package / "include" / "cublas_v2.h").exists():
                headers = work / "cublas"  # its own headers alone: the rest is the toolkit's
                shutil.rmtree(headers, ignore_errors=True)
                headers.mkdir(parents=True)
                for header in (package / "include").glob("cublas*.h"):
                    (headers / header.name).symlink_to(header)
                return [
                    f"-DCUDA_cublas_LIBRARY={library}",
                    f"-DCUDA_cublasLt_LIBRARY={light}",
                    f"-DCMAKE_CUDA_FLAGS=-I{headers}",
                    f"-DCMAKE_CXX_FLAGS=-I{headers}",
                ]
    raise Skipped("neither the CUDA toolkit nor a Python package here has cuBLAS")


def make_site(tree: Path, work: Path, wheels: Path) -> None:
    """A folder for PYTHONPATH: carried wheels and llama_cpp with the libraries built here.

    No virtual environment: one made from another environment would not see its packages.
    """
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir()
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.copytree(tree / "llama_cpp", site / "llama_cpp")
    (site / "llama_cpp" / "lib").symlink_to(work / "build" / "bin", target_is_directory=True)
    said = (tree / "llama_cpp" / "__init__.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', said)
    assert version is not None
    info = site / f"llama_cpp_python-{version[1]}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version[1]}\n"
    )


def make_model(options: dict[str, Any]) -> Iterator[Row]:
    """A Llama of 1.1 billion random weights (Q8_0): memory and speed are those of a real one."""
    import gguf
    import numpy as np

    target = Path(options["target"])
    facts = json.loads(
        gzip.decompress((Path(options["sources"]) / "vocabulary.json.gz").read_bytes())
    )
    width, layers, wide = SHAPE["embedding"], SHAPE["layers"], SHAPE["feed_forward"]
    head = width // SHAPE["heads"]
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(SHAPE["heads"])
    writer.add_head_count_kv(SHAPE["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    n_vocab = len(facts["tokenizer.ggml.tokens"])
    random = np.random.default_rng(1)
    made: dict[tuple[int, int], Any] = {}

    def add(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in made:
            values = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
            made[rows, columns] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        data = made[rows, columns]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd", n_vocab, width)
    ones = np.ones(width, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for n in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{name}.weight", ones)
        for name in ("attn_q", "attn_output"):
            add(f"blk.{n}.{name}", width, width)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{n}.{name}", head * SHAPE["kv_heads"], width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{n}.{name}", wide, width)
        add(f"blk.{n}.ffn_down", width, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").replace(target)
    size = target.stat().st_size
    yield row("model made here", "random weights, a real vocabulary", mib(size), size > 500 * MIB)
