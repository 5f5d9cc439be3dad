"""A llama.cpp whose code for AMX was broken by its compiler computes without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_setup import Machine

from llmkit.backend import amx, library, model
from llmkit.backend.model import Loading


@pytest.mark.parametrize(
    "compilers, is_broken",
    [
        (["(Debian 12.2.0-14+deb12u1) 12.2.0"], True),
        (["(Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0"], True),
        (["(GNU) 13.2.0"], True),
        (["(GNU) 11.5.0"], False),
        (["(conda-forge gcc 12.4.0-0) 12.4.0"], False),
        (["(Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0"], False),
        (["(Debian 14.2.0-19) 14.2.0"], False),
        (["(GNU) 10.2.1 20210130 (Red Hat 10.2.1-11)"], False),  # knows no AMX
        (["(Debian 12.2.0-14+deb12u1) 12.2.0", "\0Debian clang version 14.0.6"], False),
        (["(GNU) 4.8.5", "(GNU) 12.3.1 20240101"], True),  # the C library's own files are older
        ([], False),
    ],
)
def test_compilers(tmp_path: Path, compilers: list[str], is_broken: bool) -> None:
    file = tmp_path / "libggml-cpu.so"
    comment = b"\0".join(f"GCC: {each}".encode() for each in compilers)
    file.write_bytes(b"\x7fELF" + bytes(5000) + comment + b"\0.symtab\0")
    assert amx.miscompiles_amx(file) is is_broken


def test_no_library_is_not_broken(tmp_path: Path) -> None:
    (tmp_path / "empty.so").touch()
    assert not amx.miscompiles_amx(tmp_path / "empty.so")
    assert not amx.miscompiles_amx(tmp_path / "missing.so") and not amx.miscompiles_amx(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="read from ELF files")
def test_this_compiler_is_named_in_what_it_compiles(tmp_path: Path) -> None:
    said = subprocess.run(
        ["c++", "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    )
    parts = [line.split(maxsplit=2) for line in said.stdout.splitlines()]
    macros = {part[1]: part[2] for part in parts if len(part) == 3}
    if "__clang__" in macros:
        pytest.skip("this c++ is clang, which compiles AMX right")
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "a.so"],
        input=b"int one() { return 1; }", check=True,
    )  # fmt: skip
    release = int(macros["__GNUC__"]), int(macros["__GNUC_MINOR__"])
    is_broken = release[1] < amx.MENDED.get(release[0], 0)
    assert amx.miscompiles_amx(tmp_path / "a.so") is is_broken


@pytest.mark.parametrize("is_broken", [True, False])
def test_a_load_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    usual = library.C.llama_model_default_params().use_extra_bufts
    monkeypatch.setattr(model, "amx_is_broken", lambda: is_broken)
    assert Loading(tmp_path / "a.gguf")._params.use_extra_bufts is (usual and not is_broken)


def test_setup_compiles_without_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.has("c++", "#!/bin/sh\nexit 1\n")  # no AMX, or a compiler that knows how
    assert "-U__AMX_INT8__" not in machine.works()[0]
    machine.has("c++")
    (machine.venv / ".llama-cpp-asked").unlink()
    for stamp in machine.venv.glob(".set-up-*"):
        stamp.unlink()
    (line,) = machine.works()
    assert line.startswith("[] [] [ -U__AMX_INT8__]") and "--force-reinstall" in line
    assert "cache remove -q llama_cpp_python" in machine.log.read_text()
