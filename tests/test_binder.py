"""Binder's steps, in a scratch environment: what they install runs the lessons' models, found
without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.model


def test_post_build_makes_an_image_that_works(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    home = tmp_path / "home"
    home.mkdir()
    # pip's cache holds the llama.cpp that was compiled for this machine: compiling every variant
    # would take a quarter of an hour.
    cache = subprocess.run(
        [sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}",
        "HOME": str(home),
        "PIP_CACHE_DIR": cache,
        "PIP_COMPILE": "0",  # a minute less
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", ROOT / "binder" / "postBuild"],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    code = (
        "import llmkit; llm = llmkit.load(); "
        "print(llm.generate('Once', max_tokens=2).usage.completion_tokens, "
        "llmkit.load('minilm').embed('a').shape); "
        "speech = llmkit.load('hibari').say('Good morning.', seed=1); "
        "print(llmkit.load('whisper-tiny.en').transcribe(speech))"
    )
    offline = {**env, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    used = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", code],
        env=offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert used.stdout == "2 (384,)\nGood morning.\n", used.stderr
    lessons = subprocess.run(
        [tmp_path / "env" / "bin" / "jupyter", "lab", "--version"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert lessons.returncode == 0
