"""Inputs of people who used notebooks like ours, each with the right value: `cases/`."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cases import docstrings
from test_cases import CASES, load

import llmkit
from llmkit.errors import InvalidRequestError
from llmkit.protocol.schema import normalized
from llmkit.sessions.toolbox import Toolbox


def test_all_files_of_a_model_count() -> None:
    assert llmkit.estimate(CASES / "split" / "pocket-00001-of-00003.gguf").weights_bytes == 95_360


def test_docstrings_are_read_in_their_styles() -> None:
    forecast, search = Toolbox([docstrings.forecast, docstrings.search]).tools
    fields = {
        name: field["description"]
        for tool in (forecast, search)
        for name, field in tool.parameters["properties"].items()
    }
    assert fields["station"] == "Code of the station, four letters."
    assert " ".join(fields["days"].split()) == "How many days ahead, seven at most."
    assert [line.strip() for line in fields["mode"].split("\n")] == [
        "One of:",
        '- "fast": the newest year only',
        '- "deep": everything',
    ]


def test_prices_are_no_formulas() -> None:
    from llmkit.notebook.charts import NO_MATH
    from llmkit.notebook.display import completion_html
    from llmkit.protocol import Completion, FinishReason

    assert "mathjax_ignore" in NO_MATH and NO_MATH in completion_html(
        Completion(load("18-prices.json")[1]["content"], FinishReason.STOP)
    )


def test_a_pasted_cell_goes_as_it_is() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.magics import LLMMagics

    text = (CASES / "17-pasted-cell.txt").read_text()
    assert LLMMagics(InteractiveShell(), print, print)._expand(text) == text


@pytest.mark.parametrize(
    ("schema", "kept"),
    [
        ({"type": "array", "minItems": None, "items": {}}, {"type": "array", "items": {}}),
        (
            {"type": "object", "minProperties": None, "required": ["a"], "properties": None},
            {"type": "object", "required": ["a"]},
        ),
        ({"enum": None, "type": "string"}, {"type": "string"}),
        ({"const": None}, {"const": None}),
        ({"type": "number", "multipleOf": None, "maximum": None}, {"type": "number"}),
    ],
)
def test_a_keyword_that_is_null_is_not_there(schema: Any, kept: Any) -> None:
    """Serializers write every field that a class knows."""
    assert normalized(schema) == kept


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 1e400},
        {"type": "string", "minLength": float("nan")},
        {"enum": 5},
        {"$defs": 5, "type": "string"},
        {"prefixItems": 5},
        {"anyOf": {}},
        {"properties": []},
    ],
)
def test_a_malformed_keyword_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match="|".join(re.escape(key) for key in schema)):
        normalized(schema)
