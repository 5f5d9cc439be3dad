"""Python functions as tools: how they are described and called, and the loop on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

import llmkit
from llmkit.errors import InvalidRequestError
from llmkit.sessions.toolbox import Toolbox


def weather(
    city: str, unit: Literal["C", "F"] = "C", days: list[int] | None = None
) -> dict[str, Any]:
    """The weather of a city,
    today.

    Args:
        city: the city's name
        unit (str): of the temperature
    """
    if city == "Atlantis":
        raise LookupError("no such city")
    return {"city": city, "unit": unit, "days": days}


def test_a_function_is_described_by_its_hints_and_docstring() -> None:
    (tool,) = Toolbox([weather]).tools
    properties = tool.parameters["properties"]
    assert (tool.name, tool.description) == (
        "weather",
        "The weather of a city, today.",
    ) and tool.parameters["required"] == ["city"]
    assert properties["city"] == {
        "description": "the city's name",
        "title": "City",
        "type": "string",
    } and properties["unit"]["enum"] == ["C", "F"]
    assert (
        properties["unit"]["description"] == "of the temperature"
        and tool.parameters["additionalProperties"] is False
    )


def test_calls_are_checked_and_errors_are_told() -> None:
    box = Toolbox([weather])
    assert json.loads(box.run("weather", '{"city": "Rome", "days": [1]}')) == {
        "city": "Rome",
        "unit": "C",
        "days": [1],
    }
    assert box.run("weather", '{"city": "Atlantis"}') == "Error: LookupError: no such city"
    assert box.run("weather", '{"city": "Rome", "unit": "K"}').startswith("Error: ") and box.run(
        "weather", "{}"
    ).startswith("Error: ")


def test_tools_of_every_kind() -> None:
    async def later(schema: str, json: int) -> str:
        return schema * json

    def odd() -> Any:
        circle: list[Any] = []
        circle.append(circle)
        return {("a", 1): circle}

    box = Toolbox([later, odd])
    assert box.run("later", '{"schema": "x", "json": 2}') == "xx" and "[...]" in box.run(
        "odd", "{}"
    )
    assert (
        box.tools[0].parameters["required"] == ["schema", "json"]
        and box.run("later", '{"schema": "x"}') == "Error: json: Field required"
    )


@pytest.mark.parametrize("bad", [[5], [weather, weather], [lambda x: x], [print]])
def test_what_is_no_tool(bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tools"):
        Toolbox(bad)


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=2, share=False)
    yield handle
    handle.unload()


@pytest.mark.model
def test_the_loop_calls_and_answers(llm: llmkit.LLM) -> None:
    seen: list[tuple[int, int]] = []

    def add(a: Literal[1, 2, 3], b: Literal[1, 2, 3]) -> int:
        """Add two numbers."""
        seen.append((a, b))
        return a + b

    done = llm.chat(
        "What is 1 + 2?",
        tools=[add],
        tool_choice="required",
        max_rounds=1,
        max_tokens=80,
        temperature=0,
    )
    assert (
        seen
        and all(1 <= x <= 3 for pair in seen for x in pair)
        and done.text
        and "<tool_call>" not in done.text
    )
    with pytest.raises(InvalidRequestError, match="streamed"):
        llm.chat("x", tools=[add], stream=True)
    with pytest.raises(InvalidRequestError, match="no tool 'sub'"):
        llm.chat("x", tools=[add], tool_choice="sub")
