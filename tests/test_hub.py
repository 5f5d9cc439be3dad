"""Names on the Hugging Face hub: the real huggingface_hub against a small hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from loopback_hub import Hub, serving

from llmkit.models.hub import is_hub_name

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    model = tiny_models.write(tmp_path_factory.mktemp("hub") / "tiny.gguf", "llama")
    content = {"org/tiny": {"tiny-f32.gguf": model.read_bytes()}}
    with serving(Hub(content, gated={"gated/model"})) as hub:
        yield hub


def load(name: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    code = f"""
import llmkit
try:
    with llmkit.load({name!r}, n_ctx=256, n_slots=1, share=False) as llm:
        print(llm.name, llm.generate("a", max_tokens=3, ignore_eos=True).usage.completion_tokens)
except llmkit.ModelNotFoundError as error: print("not found:", error)
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )


def test_a_file_of_the_hub_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    done = load("org/tiny:tiny-f32.gguf", hub.url, tmp_path)
    assert done.stdout == "tiny-f32 3\n", done
    assert load("org/tiny:F32", hub.url, tmp_path).stdout == "tiny-f32 3\n"
    assert len(hub.gets()) == 1
    assert (
        load("org/tiny:tiny-f32.gguf", "http://127.0.0.1:9", tmp_path).stdout == "tiny-f32 3\n"
    ), "what is here needs no hub"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/tiny:other.gguf", "no file 'other.gguf'; it has tiny-f32.gguf"),
        ("org/none:x.gguf", "no repository org/none"),
        ("gated/model:x.gguf", "accept its terms"),
        ("org/tiny@v9:tiny-f32.gguf", "no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path, name: str, words: str) -> None:
    done = load(name, hub.url, tmp_path)
    assert done.stdout.startswith("not found:") and words in done.stdout, done


def test_no_way_to_the_hub(tmp_path: Path) -> None:
    assert (
        "cannot be reached" in load("org/tiny:tiny-f32.gguf", "http://127.0.0.1:9", tmp_path).stdout
    )


def test_names() -> None:
    assert is_hub_name("org/repo:file.gguf") and is_hub_name("org/repo@main:sub/file-Q4_0.gguf")
    assert not any(
        is_hub_name(n)
        for n in ("smollm2", "/a/b.gguf", "org/repo", "C:/x.gguf", "org/repo:file.bin")
    )
