"""Python functions as chat tools: schemas from their signatures, calls with checked arguments."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from llmkit.chat.parsers.events import Call, Content, Reasoning
from llmkit.chat.reading import AnswerReader
from llmkit.chat.tools import call_grammar
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Completion, Message, ModelDescription, Tool, ToolCall

__all__ = ["Toolbox", "converse"]

ARGUMENT = re.compile(r"^\s*(?:\*\s+)?(?:``)?(\w+)(?:``)?(?:\s*\([^)]*\))?\s*:\s*(\S.*)$")
SECTION = re.compile(
    r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Attributes|Notes?)\s*:?\s*$|^\s*:\w+",
    re.MULTILINE,
)
ITEM = re.compile(r"\s*([-*+•]|\d+[.)])\s")


class Toolbox:
    """Functions by name.

    >>> def add(a: int, b: int = 1) -> int:
    ...     '''Add two numbers.
    ...
    ...     a: the first
    ...     '''
    ...     return a + b
    >>> box = Toolbox([add])
    >>> box.tools[0].description, box.tools[0].parameters["properties"]["a"]
    ('Add two numbers.', {'description': 'the first', 'title': 'A', 'type': 'integer'})
    >>> box.run("add", '{"a": 2}')
    '3'

    Raises `InvalidRequestError` for something that is not a function, or has parameters whose types
    JSON cannot express.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        self._models: dict[str, Any] = {}
        self.tools: list[Tool] = []
        for function in functions:
            self._add(function)

    def _add(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise InvalidRequestError(
                f"tools must be named functions, not {function!r:.80}.", "tools"
            )
        if name in self._functions:
            raise InvalidRequestError(f"tools: two functions are named {name!r}.", "tools")
        summary, descriptions = _documented(inspect.getdoc(function) or "")
        model = _arguments(function, name, descriptions)
        self._functions[name], self._models[name] = function, model
        self.tools.append(
            Tool(
                name, summary, {k: v for k, v in model.model_json_schema().items() if k != "title"}
            )
        )

    def run(self, name: str, arguments: str) -> str:
        """Call a function with JSON arguments; its result as text.

        An error is returned as text too, so that the model can try again.
        """
        from pydantic import ValidationError

        try:
            values = self._models[name].model_validate_json(arguments)
            result = self._functions[name](
                **{
                    info.alias: getattr(values, field)
                    for field, info in type(values).model_fields.items()
                }
            )
            if inspect.iscoroutine(result):
                result = _awaited(result)
            return result if isinstance(result, str) else _as_text(result)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            return f"Error: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        except Exception as error:
            return f"Error: {type(error).__name__}: {error}"


def _arguments(function: Callable[..., Any], name: str, descriptions: dict[str, str]) -> Any:
    """A pydantic model of a function's parameters."""
    import pydantic

    fields: dict[str, Any] = {}
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
                parameter.POSITIONAL_ONLY,
            ):
                raise InvalidRequestError(
                    f"tools: {name}() has the parameter {parameter}, "
                    "which a model cannot pass by name.",
                    "tools",
                )
            default = ... if parameter.default is parameter.empty else parameter.default
            # By alias: a parameter's name may clash with an attribute of pydantic models.
            field = pydantic.Field(
                default, alias=parameter.name, description=descriptions.get(parameter.name)
            )
            fields[f"argument_{len(fields)}"] = (hints.get(parameter.name, str), field)
        model = pydantic.create_model(
            name, __config__=pydantic.ConfigDict(extra="forbid"), **fields
        )
        model.model_json_schema()
        return model
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(
            f"tools: the parameters of {name}() cannot be described to a model: {error}", "tools"
        ) from None


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run in its own thread, since this one may have a running event loop."""
    import asyncio

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _as_text(result: Any) -> str:
    try:
        return json.dumps(result, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not allow, or a cycle
        return str(result)


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's first paragraph, and its descriptions of parameters.

    Reads the styles of Google, numpy and Sphinx, and lines like ``name: words``.
    """
    import docstring_parser

    try:
        parsed = docstring_parser.parse(text)
    except docstring_parser.ParseError:
        parsed = docstring_parser.Docstring()
    first, short = text.split("\n\n", 1)[0], parsed.short_description or ""
    # A sentence may span lines; a section directly below it is not part of it.
    summary = " ".join(
        (
            short
            if short and (SECTION.search(first) or re.search(r"^\s*[:@]\w", first, re.MULTILINE))
            else first
        ).split()
    )
    descriptions = {
        name.strip(" *`"): _flowing(p.description)
        for p in parsed.params
        if p.description and p.args[0] != "attribute"
        for name in p.arg_name.split(",")
    }
    if not descriptions and not SECTION.search(text):
        matches = (ARGUMENT.match(line) for line in text.splitlines())
        descriptions = {match[1]: match[2].strip() for match in matches if match}
    return summary, descriptions


def _flowing(text: str) -> str:
    """A paragraph's lines joined into one; list items keep their own lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line.strip() and not ITEM.match(line) and lines[-1].strip():
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.strip())
    return "\n".join(lines).strip()


def converse(
    ask: Callable[..., Completion],
    model: ModelDescription,
    functions: Sequence[Callable[..., Any]],
    messages: list[Message],
    choice: str,
    max_rounds: int,
) -> Completion:
    """Ask, run the tool calls, append their results and ask again, until there is an answer.

    ``ask`` takes messages, tools and a grammar. After ``max_rounds`` no tools are offered.
    """
    box = Toolbox(functions)
    for number in range(max_rounds + 1):
        # The last round offers no tools, so the model must answer.
        tools = tuple(box.tools) if number < max_rounds else ()
        forced = bool(tools) and choice != "auto"
        grammar = (
            call_grammar(model.tool_form, tools, choice, parallel=True)
            if tools and (forced or not model.reasoning)
            else None
        )
        more = {} if grammar is None else {"grammar": grammar}
        completion = ask(messages, tools=tools, show_marks=True, **more)
        events = AnswerReader(
            model, tools, forced=forced, after_results=messages[-1].role == "tool"
        ).whole(completion)
        calls = [ToolCall(e.call_id, e.name, e.arguments) for e in events if isinstance(e, Call)]
        if not calls:
            break
        choice = "auto"
        messages.append(
            Message(
                "assistant",
                "".join(e.text for e in events if isinstance(e, Content)),
                tool_calls=tuple(calls),
            )
        )
        messages += [
            Message("tool", box.run(c.name, c.arguments), name=c.name, tool_call_id=c.call_id)
            for c in calls
        ]
    text, thoughts = (
        "".join(e.text for e in events if isinstance(e, kind)) for kind in (Content, Reasoning)
    )
    return replace(completion, text=text, reasoning=thoughts)
