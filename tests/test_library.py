"""The models in a folder: split and broken files, links, strange names, and finding one by name."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from header_files import split, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.cli import main
from llmkit.errors import InvalidModelFileError, InvalidRequestError, ModelNotFoundError
from llmkit.models import gguf, library, scanning
from llmkit.models.library import Library, StoredModel, check_folder
from llmkit.models.names import near
from llmkit.system.text import printable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def shelf(root: Path, tmp_path: Path) -> Library:
    """A library of one folder and an empty cache."""
    return Library(root, cache=tmp_path / "hub")


def ids(shelf: Library) -> list[str]:
    return [m.id for m in shelf.models() if m.source != "package"]


def by_id(shelf: Library) -> dict[str, StoredModel]:
    return {m.id: m for m in shelf.models()}


def test_a_folder_and_those_below_it(root: Path, shelf: Library) -> None:
    write(root / "one-Q4_K_M.gguf")
    write(root / "org" / "repo" / "two.gguf", general__file_type=1)
    write(root / ".hidden" / "no.gguf")
    write(root / ".no.gguf")
    write(root / "one-imatrix.gguf")
    write(root / "adapter.gguf", general__type="adapter")
    (root / "notes.txt").write_text("no model")
    found = by_id(shelf)
    assert ids(shelf) == ["one-Q4_K_M", "org/repo/two"]
    two = found["org/repo/two"]
    assert (two.quantization, two.architecture, two.n_ctx) == ("F16", "llama", 512)
    assert two.parameters == 32 * 64 and two.size_bytes == two.path.stat().st_size
    assert two.files == (two.path,) and not two.fault and two.modified > 0
    assert found["one-Q4_K_M"].quantization == "F16", "the header counts, not the name"


def test_the_parts_of_a_split_model_are_one_entry(root: Path, shelf: Library) -> None:
    whole = split(root, "whole")
    gone = split(root / "sub", "gone")
    gone[1].unlink()
    gone[0].unlink()
    split(root, "both", 2)
    write(root / "both.gguf")
    found = by_id(shelf)
    assert ids(shelf) == ["both", "both-00001-of-00002", "sub/gone", "whole"]
    assert found["whole"].files == tuple(whole) and not found["whole"].fault
    assert found["whole"].size_bytes == sum(f.stat().st_size for f in whole)
    assert shelf.resolve("whole").path == whole[0] and shelf.resolve("whole").name == "whole"
    fault = found["sub/gone"].fault
    assert "2 of its 3 files are missing" in fault and gone[1].name in fault
    with pytest.raises(InvalidModelFileError, match="2 of its 3 files are missing"):
        shelf.resolve("sub/gone")


def test_projectors_go_with_their_models(root: Path, shelf: Library) -> None:
    write(root / "a" / "gemma-3-4b-it-Q4_K_M.gguf")
    write(root / "a" / "gemma-3-4b-it-Q8_0.gguf")
    write(root / "a" / "mmproj-model-f16.gguf", "clip")
    write(root / "a" / "mmproj-model-f32.gguf", "clip")
    write(root / "b" / "qwen-vl-Q4_0.gguf")
    write(root / "b" / "llama-8b.gguf")
    eye = write(root / "b" / "qwen-vl-mmproj-bf16.gguf", general__type="mmproj")
    write(root / "c" / "alone.gguf")
    found = by_id(shelf)
    f16 = root / "a" / "mmproj-model-f16.gguf"
    assert {m.mmproj for i, m in found.items() if i.startswith("a/")} == {f16}
    assert found["b/qwen-vl-Q4_0"].mmproj == eye and found["b/llama-8b"].mmproj is None
    assert found["c/alone"].mmproj is None and len(ids(shelf)) == 5


STRANGE = [
    "line\nend",
    "tab\tand \x1b[31mred",
    "größe-模型-😀",
    "e\u0301 decomposed",
    "right\u202eto left",
    "-rf",
    "a'b\"c`d$(e)",
    "x" * 250,
    "ü" * 125,
    "%2e%2e%2f",
    "back\\slash",
    " space ",
    "dots...",
]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_strange_names_are_safe(
    name: str, root: Path, shelf: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(root / f"{name}.gguf")
    (id_,) = ids(shelf)
    assert id_.isprintable() and id_ == printable(name)
    assert shelf.resolve(id_).path == path and shelf.find(f"{id_}.gguf").id == id_
    assert main(["models", "list", "--models-dir", str(root)]) == 0
    assert id_ in capsys.readouterr().out.split("smollm2")[0]
    assert main(["models", "info", "--models-dir", str(root), "--json", "--", id_]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == id_
    assert main(["models", "rm", "--yes", "--models-dir", str(root), "--", id_]) == 0
    assert not path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="names of bytes")
def test_a_name_that_is_no_text(root: Path, shelf: Library) -> None:
    path = Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.gguf"))
    os.link(write(root / "plain.gguf"), path)
    assert ids(shelf) == ["\\udcff\\udcfe", "plain"]
    assert shelf.resolve("\\udcff\\udcfe").path == path
    assert json.dumps([m.as_dict() for m in shelf.models()]).encode("ascii")
    repr(shelf.models()).encode()


def test_links_and_dots_stay_inside(root: Path, shelf: Library, tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere" / "secret.gguf")
    real = write(root / "real.gguf")
    (root / "alias.gguf").symlink_to(real)
    (root / "leak.gguf").symlink_to(outside)
    (root / "gone.gguf").symlink_to(root / "nothing.gguf")
    (root / "loop.gguf").symlink_to(root / "loop.gguf")
    (root / "folder").symlink_to(outside.parent)
    (root / "again").symlink_to(root)
    listing = shelf.models()
    found = by_id(shelf)
    assert ids(shelf) == ["alias", "gone", "leak", "loop", "real"]
    assert not found["alias"].fault and found["real"].path == real
    assert "leads out of" in found["leak"].fault and str(outside) in found["leak"].fault
    assert "is not there" in found["gone"].fault and found["loop"].fault
    assert any("folder is left out: it leads out" in p for p in listing.problems)
    with pytest.raises(InvalidModelFileError, match="leads out"):
        shelf.resolve("leak")
    for path in (
        "../elsewhere/secret.gguf",
        str(outside),
        "real/../../elsewhere/secret",
        "again/../real",
    ):
        with pytest.raises(ModelNotFoundError, match="leads out of the models dir"):
            shelf.find(path)
    assert shelf.find(str(real)).id == "real" and shelf.find("x/../real.gguf").id == "real"
    with pytest.raises(ModelNotFoundError):
        shelf.find("real\0.gguf")


def test_a_link_that_changes_after_the_look(
    root: Path, shelf: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = write(tmp_path / "secret.gguf")
    model = write(root / "a.gguf")
    seen = shelf.find("a")
    monkeypatch.setattr(shelf, "find", lambda name: seen)
    model.unlink()
    model.symlink_to(outside)
    with pytest.raises(InvalidModelFileError, match="leads out"):
        shelf.resolve("a")


def test_broken_files_are_listed_with_their_fault(root: Path, shelf: Library) -> None:
    good = write(root / "good.gguf").read_bytes()
    (root / "empty.gguf").touch()
    (root / "text.gguf").write_text("<!DOCTYPE html>")
    (root / "cut.gguf").write_bytes(good[:-40])
    (root / "header.gguf").write_bytes(good[:40])
    (root / "counts.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    (root / "folder.gguf").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe.gguf")  # opening it would wait for a writer
    found = by_id(shelf)
    assert "is empty" in found["empty"].fault and "HTML" in found["text"].fault
    assert "truncated" in found["cut"].fault and "damaged" in found["header"].fault
    assert "damaged" in found["counts"].fault
    assert "folder" not in found and not found["good"].fault
    assert "pipe" not in found or "not a regular file" in found["pipe"].fault
    assert "truncated" in repr(shelf.models()) and "damaged" in shelf.models()._repr_html_()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_header_stops_the_listing(data: Any, root: Path, shelf: Library) -> None:
    path = root / "fuzzed.gguf"
    content = bytearray(write(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(4, min(len(content) - 1, 400)))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    (model,) = [m for m in shelf.models() if m.source == "folder"] or [None]
    if model is not None:
        assert model.id == "fuzzed" and len(model.architecture) <= 400
        json.dumps(model.as_dict())


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Not as root, whom no folder refuses; the way to the folder is open meanwhile."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    way = {p: p.stat().st_mode for p in folder.parents if p.stat().st_mode & 0o011 != 0o011}
    for p, mode in way.items():
        p.chmod(mode | 0o011)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for p, mode in way.items():
            p.chmod(mode)


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_a_folder_that_cannot_be_read(root: Path, shelf: Library) -> None:
    write(root / "closed" / "a.gguf")
    secret = write(root / "secret.gguf")
    write(root / "listed" / "b.gguf")
    root.chmod(0o755)
    (root / "closed").chmod(0)
    (root / "listed").chmod(0o444)  # names, but nothing behind them
    secret.chmod(0)
    with as_nobody(root):
        listing = shelf.models()
        assert any("closed cannot be read: Permission denied" in p for p in listing.problems)
        assert "Permission denied" in by_id(shelf)["secret"].fault
        assert "Permission denied" in by_id(shelf)["listed/b"].fault
        with pytest.raises(InvalidModelFileError, match="Permission denied"):
            shelf.resolve("secret")
    secret.chmod(0o644)
    root.chmod(0)
    with as_nobody(root):
        with pytest.raises(InvalidRequestError, match=r"models dir .* cannot be read: Permission"):
            check_folder(root)
        assert any("models dir" in p and "Permission" in p for p in shelf.models().problems)
    root.chmod(0o755)
    (root / "closed").chmod(0o755)
    (root / "listed").chmod(0o755)
    assert not by_id(shelf)["secret"].fault, "mended without a new time: seen all the same"


def test_a_models_dir_that_is_none(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        check_folder(root / "none")
    with pytest.raises(InvalidRequestError, match="is not a folder"):
        check_folder(write(root / "a.gguf"))
    check_folder(root)
    assert main(["models", "list", "--models-dir", str(root / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_names(root: Path, shelf: Library) -> None:
    for name in ("Qwen3-0.6B-Q4_K_M", "a/Model", "b/model", "c/x", "C2"):
        write(root / f"{name}.gguf")
    assert shelf.find("Qwen3-0.6B-Q4_K_M").id == shelf.find("qwen3-0.6b-q4_k_m.GGUF").id
    assert shelf.find("A/model").id == "a/Model" and shelf.find("b/model").id == "b/model"
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'Qwen3-0\.6B-Q4_K_M'"):
        shelf.find("qwen3-0.6B-Q4_KM")
    with pytest.raises(ModelNotFoundError, match="'a/Model' or 'b/model'"):
        shelf.find("model")
    with pytest.raises(ModelNotFoundError, match="no model"):
        shelf.find("z" * 100_000)
    write(root / "A" / "MODEL.gguf")
    with pytest.raises(ModelNotFoundError, match="may be 'a/Model', 'A/MODEL'"):
        shelf.find("a/MODEL")
    write(root / "smollm2.gguf")
    assert shelf.find("smollm2").source == "folder", "the user's own comes first"
    decomposed = "e\u0301"
    write(root / f"caf{decomposed}.gguf")
    assert shelf.find("café").id == f"caf{decomposed}"
    assert near("", ["a"]) == "."


def test_names_by_which_models_were_downloaded(root: Path, shelf: Library) -> None:
    for name in ("org/repo/m-Q8_0", "org/repo/m-Q4_0", "org/repo/sub/n-Q4_0", "org/one/one-F16"):
        write(root / f"{name}.gguf")
    split(root / "org" / "parts", "p", 2)
    found = {
        "org/repo:Q8_0": "org/repo/m-Q8_0",
        "org/repo:m-Q8_0.gguf": "org/repo/m-Q8_0",
        "https://huggingface.co/org/repo:sub/n-Q4_0.gguf": "org/repo/sub/n-Q4_0",
        "org/one": "org/one/one-F16",
        "org/parts:p-00002-of-00002.gguf": "org/parts/p",
    }
    for name, id_ in found.items():
        stored = shelf.get(name)
        assert stored is not None and stored.id == shelf.find(name).id == id_, name
    for name in ("org/repo", "org/repo:Q4_0", "org/repo@main:Q8_0", "org/rep:Q8_0", "org/one:Q8_0"):
        assert shelf.get(name) is None, name
        with pytest.raises(ModelNotFoundError):
            shelf.find(name)


def test_a_server_looks_at_the_disk_once_a_second(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Library(root, cache=tmp_path / "hub", keep_s=60)
    write(root / "a.gguf")
    looks, real = [], scanning.scan_folder
    monkeypatch.setattr(scanning, "scan_folder", lambda r: looks.append(r) or real(r))
    for name in ("b", "c", "d"):
        with pytest.raises(ModelNotFoundError):
            shelf.find(name)
    assert shelf.find("a").id == "a" and len(looks) == 1
    write(root / "b.gguf")
    assert len(shelf.models()) > 2 and shelf.find("b").id == "b", "a list is always fresh"
    looked = len(looks)
    found = shelf.get("b")
    assert found is not None and found.path == root / "b.gguf" and shelf.get("B") is None
    assert shelf.get("b.gguf") is None and shelf.get(str(root / "b.gguf")) is None
    assert len(looks) == looked
    write(root / "smollm2.gguf")
    shelf.models()
    own = shelf.get("smollm2")
    assert own is not None and own.source == "folder", "the user's own comes first"


def test_copies_that_are_being_made(root: Path, shelf: Library) -> None:
    part = root / scanning.OWN / ".0123456789abcdef-0.making"
    part.parent.mkdir()
    part.write_bytes(b"x" * 2_000_000)
    assert not shelf.models().problems
    old = time.time() - 2 * scanning.STALE_S
    os.utime(part, (old, old))
    (problem,) = shelf.models().problems
    assert "2 MB" in problem and part.name in problem and "killed" in problem
    assert "download" not in problem


def test_headers_are_read_once(root: Path, shelf: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library._facts.cache_clear()
    path = write(root / "a.gguf")
    read, real = [], gguf.read_header
    monkeypatch.setattr(gguf, "read_header", lambda p: read.append(p) or real(p))
    for _ in range(3):
        assert by_id(shelf)["a"].n_ctx == 512
    assert read.count(path) == 1
    write(path, "qwen3")
    os.utime(path, ns=(1, 1))
    assert by_id(shelf)["a"].architecture == "qwen3" and read.count(path) == 2
