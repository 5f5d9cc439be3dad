"""Prefixes on disk, on the real embedded model: saved, restored, and beside copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import wait_for
from test_features import PASSAGE

import llmkit
from llmkit.backend.llama import LlamaRunner
from llmkit.backend.model import LlamaModel
from llmkit.errors import InvalidRequestError
from llmkit.models.registry import resolve
from llmkit.protocol import SamplingParams

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    yield handle
    handle.unload()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The model under a name of its own: one file is one engine in a process."""
    path = tmp_path / "model.gguf"
    try:
        os.link(resolve("smollm2").path, path)
    except OSError:
        shutil.copy(resolve("smollm2").path, path)
    return path


def test_a_saved_prefix_survives(file: Path, tmp_path: Path) -> None:
    text = "You are a helpful assistant who knows all the rules of this house. " * 12
    options = {"n_ctx": 512, "n_slots": 2, "share": False, "prefix_dir": tmp_path / "kv"}
    with llmkit.load(file, **options) as llm:  # type: ignore[arg-type]
        cold = llm.generate(text + "Now", max_tokens=6, temperature=0)
        size = llm.save_prefix(text)
        (saved,) = (tmp_path / "kv").iterdir()
        assert size > 100 and saved.stat().st_mode & 0o077 == 0
    with llmkit.load(file, **options) as llm:  # type: ignore[arg-type]
        warm = llm.generate(text + "Now", max_tokens=6, temperature=0)
        assert warm.usage.cached_tokens >= size - 1 and warm.text == cold.text
    for saved in (tmp_path / "kv").iterdir():
        data = bytearray(saved.read_bytes())
        data[len(data) // 2] ^= 255
        saved.write_bytes(data)
    (tmp_path / "kv" / "x.kv").write_bytes(b"foreign")
    with llmkit.load(file, **options) as llm:  # type: ignore[arg-type]
        with pytest.warns(RuntimeWarning, match="skipping"):
            again = llm.generate(text + "Now", max_tokens=6, temperature=0)
            wait_for(lambda: llm.stats.num_running == 0)
        assert again.text == cold.text and again.usage.cached_tokens == 0


def test_other_settings_are_another_folder_entry(file: Path, tmp_path: Path) -> None:
    text = "A prefix that is long enough to be kept on disk, said the engine. " * 6
    with llmkit.load(file, n_ctx=512, n_slots=1, share=False, prefix_dir=tmp_path / "kv") as llm:
        llm.save_prefix(text)
    with llmkit.load(
        file, n_ctx=512, n_slots=1, share=False, prefix_dir=tmp_path / "kv", kv_type="q8_0"
    ) as llm:
        assert llm.generate(text, max_tokens=1).usage.cached_tokens == 0


def test_a_full_disk_loses_nothing(file: Path, tmp_path: Path) -> None:
    with (
        llmkit.load(
            file, n_ctx=512, n_slots=1, share=False, prefix_dir=tmp_path / "kv", disk_cache_mb=1
        ) as llm,
        pytest.warns(RuntimeWarning, match="larger than the limit"),
    ):
        with pytest.raises(llmkit.EngineError, match="could not be saved"):
            llm.save_prefix(
                "A prefix that is long enough to be kept on disk, said the engine. " * 6
            )
        assert llm.generate("The", max_tokens=3).usage.completion_tokens == 3
    assert not list((tmp_path / "kv").iterdir())


def test_saving_needs_a_place(llm: llmkit.LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prefix_dir"):
        llm.save_prefix("a")


def test_a_copy_beside_a_restored_prefix_is_the_right_one() -> None:
    """llama.cpp copies between streams at the next decode, but reads states at once: both in one
    step must not mix."""
    from llmkit.engine.batch import Batch, Chunk, Fork, Open, Park, Restore

    model = LlamaModel(resolve("smollm2").path)
    runner = LlamaRunner(model, n_ctx=512, n_slots=3)
    first, second = (
        model.vocab.tokenize(PASSAGE)[:40],
        model.vocab.tokenize("Quite another text, about boats and the sea. " * 5)[:40],
    )
    params = SamplingParams(temperature=0, logprobs=0)
    runner.execute(
        Batch(
            (Chunk(0, 0, first, False), Chunk(1, 0, second, False)),
            tuple(Open(s, s + 1, params, ()) for s in range(3)),
        )
    )
    alone = runner.execute(Batch((Chunk(0, 40, [100], True),))).scores[0]
    other = runner.execute(Batch((Chunk(1, 40, [100], True),), (Park(1, 7, second),))).scores[0]
    runner.execute(Batch((), (Fork(0, 2, 40), Park(0, 8, first), Restore(7, 0, 40))))
    output = runner.execute(Batch((Chunk(0, 40, [100], True), Chunk(2, 40, [100], True))))
    assert output.scores[1][0].logprob == pytest.approx(alone[0].logprob, abs=0.05), (
        "the copy is what the slot held before"
    )
    assert output.scores[0][0].logprob == pytest.approx(other[0].logprob, abs=0.05), (
        "and the slot is what was restored"
    )
    runner.close()
    model.close()
