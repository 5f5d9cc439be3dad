"""Hostile model files, and folders of others."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import mutations
import pytest
import tiny_models
from children import children
from fakes import wait_for

import llmkit
from llmkit.bridge import connection as files
from llmkit.errors import InvalidModelFileError, ModelLoadError
from llmkit.models import bert, gguf
from llmkit.system.files import open_plain, read_json


@pytest.mark.model
def test_a_file_that_ends_a_process_ends_a_child(tmp_path: Path) -> None:
    found = mutations.run(60, tmp_path / "cache", seed=3)
    assert "died" not in found and "unclean" not in found, found
    assert sum(map(len, found.values())) == 60 and len(found["refused"]) > 20 and found.get("works")


@pytest.mark.model
def test_a_known_file_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.runtime import probing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs: list[Path] = []
    run = probing._run
    monkeypatch.setattr(
        probing, "_run", lambda path, *more: (runs.append(path), run(path, *more))[1]
    )
    file = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    for _ in range(2):
        llmkit.load(file, n_ctx=64, n_slots=1, share=False).unload()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    llmkit.load(copy, n_ctx=64, n_slots=1, share=False).unload()
    assert runs == [file], "the same content under another name is known"
    data = bytearray(file.read_bytes())
    at = data.find(b"llama.block_count") + len(b"llama.block_count") + 4
    data[at : at + 4] = struct.pack("<I", 0)
    copy.write_bytes(data)
    with pytest.raises(ModelLoadError):
        llmkit.load(copy, n_ctx=64, n_slots=1, share=False)
    with pytest.raises(ModelLoadError):
        llmkit.load(copy, n_ctx=64, n_slots=1, share=False)
    assert len(runs) == 3, "what did not survive is not remembered as fine"


@pytest.mark.model
def test_the_stop_button_ends_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.runtime.probing import probe

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def press() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(tiny_models.write_large(tmp_path / "large.gguf"), on_wait=press)
    wait_for(lambda: not children("probing"))


@pytest.mark.model
def test_adapters_that_are_none(tmp_path: Path) -> None:
    tiny, lora = (
        tiny_models.write(tmp_path / "tiny.gguf", "llama"),
        tiny_models.write_lora(tmp_path / "lora.gguf"),
    )
    good = lora.read_bytes()
    for old, new in (
        (b"adapter.type", b"adapter.tipe"),
        (b"general.type", b"general.tipe"),
        (b"lora", b"loco"),
        (b"lora_a", b"lora_c"),
        (b"llama", b"mamba"),
    ):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(good.replace(old, new))
        try:
            llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=bad).unload()
        except ModelLoadError:
            pass
    with pytest.raises(ModelLoadError, match=r"adapter|LoRA"):
        llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=tiny)
    bad.write_bytes(good[:300])
    with pytest.raises(ModelLoadError):
        llmkit.load(tiny, n_ctx=64, n_slots=1, share=False, lora=bad)


def test_a_sparse_header_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", 9, 8, 30_000_000)
        )
        file.truncate(1 << 30)
    began = time.thread_time()
    with pytest.raises(InvalidModelFileError, match="claims"):
        gguf.read_header(path)
    assert time.thread_time() - began < 10
    path.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<IIQ", 9, 9, 3)
        + b"\0" * 100
    )
    with pytest.raises(InvalidModelFileError, match="type 9"):
        gguf.read_header(path)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "cases" / "split"
    for part in (1, 3):
        assert llmkit.estimate(folder / f"pocket-0000{part}-of-00003.gguf").weights_bytes == 95_360
    here = tmp_path / "linked"
    here.mkdir()
    for file in folder.glob("*.gguf"):
        (here / file.name).symlink_to(file)
    assert llmkit.estimate(here / "pocket-00002-of-00003.gguf").weights_bytes == 95_360, (
        "as the hub's cache has them"
    )
    (here / "pocket-00002-of-00003.gguf").unlink()
    with pytest.raises(InvalidModelFileError, match=r"pocket-00002-of-00003\.gguf is missing"):
        llmkit.estimate(here / "pocket-00001-of-00003.gguf")
    (tmp_path / "renamed.gguf").write_bytes((folder / "pocket-00001-of-00003.gguf").read_bytes())
    with pytest.raises(InvalidModelFileError, match="one of 3 files"):
        llmkit.estimate(tmp_path / "renamed.gguf")


@pytest.mark.parametrize(
    "config",
    [
        b"[" * 100_000,
        b"\xff",
        b"null",
        b'{"architectures": 5}',
        b'{"architectures": ["BertModel"], "hidden_act": []}',
        b"",
    ],
)
def test_a_damaged_folder_is_our_error(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InvalidModelFileError):
        bert.convert(tmp_path, tmp_path / "out.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_pipes_and_links_hold_nobody_up(tmp_path: Path, private_runtime: Path) -> None:
    os.mkfifo(private_runtime / "llmkit-x.json", 0o600)
    (private_runtime / "llmkit-y.json").symlink_to("/dev/zero")
    (private_runtime / "llmkit-z.json").mkdir()
    assert files.find_connections() == []
    with pytest.raises(OSError):
        open_plain(private_runtime / "llmkit-x.json")
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(InvalidModelFileError):
        gguf.read_header(tmp_path / "model.gguf")
    with pytest.raises(ValueError):
        (tmp_path / "deep.json").write_text("[" * 100_000)
        read_json(tmp_path / "deep.json", 1 << 20)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_a_prefix_folder_deletes_nothing_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "Downloads"
    folder.mkdir(mode=0o700)
    others = [folder / "film.mkv.part", folder / "photos.kv", folder / "0123456789abcdef-new.part"]
    for file in others:
        file.write_bytes(b"x" * 5000)
    stale = folder / "0123456789abcdef-old.part"
    stale.write_bytes(b"x")
    os.utime(stale, (1, 1))
    tiny = tiny_models.write(tmp_path / "tiny.gguf", "llama")
    with llmkit.load(
        tiny, n_ctx=128, n_slots=1, share=False, prefix_dir=folder, disk_cache_mb=1
    ) as llm:
        mark = llm.engine._runner._store._fingerprint  # type: ignore[attr-defined]
        llm.save_prefix("some words that are worth keeping " * 2)
    assert all(file.exists() for file in others) and not stale.exists()
    os.mkfifo(folder / f"{mark}-{'0' * 24}.kv")
    (folder / f"{mark}-{'1' * 24}.kv").write_text("[" * 100_000)
    with (
        pytest.warns(RuntimeWarning, match="skipping"),
        llmkit.load(tiny, n_ctx=128, n_slots=1, share=False, prefix_dir=folder) as llm,
    ):
        assert llm.generate("a", max_tokens=1, ignore_eos=True).usage.completion_tokens == 1
