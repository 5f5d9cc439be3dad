"""The example of a settings file has every setting, and is valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from settings_files import ALL_ROWS, uncommented, write

from llmkit.cli import main
from llmkit.settings.entries import KEY_OPTIONS, MODEL_OPTIONS
from llmkit.settings.example import example
from llmkit.settings.reading import ENGINE_OPTIONS, TABLES, TOP
from llmkit.settings.sampling import SAMPLING_OPTIONS
from llmkit.settings.serving import faults_of

# The example


def test_the_example_is_what_the_table_of_options_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "example"]) == 0
    printed = capsys.readouterr().out
    file = ROOT / "deploy" / "llmkit.example.toml"
    assert file.read_text(encoding="utf-8") == printed == example(), (
        "run `llmkit config example > deploy/llmkit.example.toml`"
    )
    assert max(map(len, printed.splitlines())) <= 100
    told = " ".join(line.removeprefix("## ") for line in printed.splitlines())
    for row in ALL_ROWS:
        assert row.name == "isolated" or row.help in told, row.name


def test_the_example_is_valid_with_and_without_its_comments(tmp_path: Path) -> None:
    assert faults_of(write(tmp_path, example())) == []
    assert tomllib.loads(example()) == {}
    for stripped in (uncommented(example()), re.sub(r"(?m)^#", "", example())):
        assert faults_of(write(tmp_path, stripped)) == []
        values = tomllib.loads(stripped)
        assert set(values) == {*TOP, *TABLES}
        assert set(values["sampling"]) == set(SAMPLING_OPTIONS)
        model = {*MODEL_OPTIONS, *ENGINE_OPTIONS, "sampling"}
        assert set(values["models"]["small"]) == model
        keys = {key for entry in values["keys"].values() for key in entry}
        assert keys == set(KEY_OPTIONS)


def test_every_option_is_a_sentence() -> None:
    for row in ALL_ROWS:
        assert row.help.endswith(".") and len(row.help) < 160, row.name
        assert row.kind != "choice" or row.choices, row.name
        if row.kind in ("integer", "number"):
            assert row.range, row.name
