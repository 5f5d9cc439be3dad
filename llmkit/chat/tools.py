"""Tool calling: the form a model writes calls in, and the grammar that constrains it. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from llmkit.chat.parsers import bare_json, deepseek, function_gemma, harmony, tagged, thinking
from llmkit.chat.parsers.bare_json import BareJsonParser
from llmkit.chat.parsers.deepseek import DeepSeekParser
from llmkit.chat.parsers.events import Parser, Plain
from llmkit.chat.parsers.function_gemma import FunctionGemmaParser
from llmkit.chat.parsers.harmony import HarmonyParser
from llmkit.chat.parsers.tagged import TaggedParser
from llmkit.chat.parsers.thinking import ReasoningParser
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Grammar, Tool
from llmkit.protocol.schema import normalized

__all__ = ["FORMATS", "call_grammar", "make_parser", "marks", "reasoning_form", "tool_form"]

# Llama 3 writes bare JSON with "parameters", Granite and Phi ("list") a list of calls; the XML of
# Qwen3-Coder and the keys and values of GLM go inside Hermes' tags; "general" is ours, for
# templates without tools. No grammar covers "harmony", "deepseek" and "function_gemma": their
# forced calls are written in the general form.
FORMATS = (
    "hermes",
    "qwen3_coder",
    "glm",
    "llama3",
    "mistral",
    "list",
    "harmony",
    "deepseek",
    "function_gemma",
    "general",
)
OTHERS: dict[str, Callable[[dict[str, Any]], Parser]] = {
    "harmony": HarmonyParser,
    "deepseek": DeepSeekParser,
    "function_gemma": FunctionGemmaParser,
}
MAX_SCHEMA_CHARS, MAX_CACHED_SCHEMAS = 128 << 10, 32
ToolChoice = Literal["auto", "required"] | str
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}


def tool_form(template: str) -> str:
    """The form of tool calls that a template mentions."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"  # with or without tools
    if "tools" not in template and "tool_calls" not in template:
        return "general"
    if "tool▁call▁begin" in template:
        return "deepseek"
    if "<start_function_call>" in template:
        return "function_gemma"
    if "<|tool_call|>" in template or "functools" in template:
        return "list"
    if "tools" not in template:
        return "general"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<function=" in template:
        return "qwen3_coder"
    if "<arg_key>" in template:
        return "glm"
    if "<tool_call>" in template:
        return "hermes"
    if "<|START_ACTION|>" in template:
        return "general"
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return "general"


def reasoning_form(template: str) -> str:
    """How the model reasons: "think" (between ``<think>`` tags), "harmony" (in a channel) or ""."""
    if tool_form(template) == "harmony":
        return "harmony"
    return "think" if "<think>" in template or "</think>" in template else ""


def marks(form: str) -> tuple[str, ...]:
    """Control tokens that the parser of a form needs to see as text."""
    calls = {
        "harmony": harmony.MARKS,
        "glm": (*tagged.MARKS, *tagged.GLM_MARKS),
        "deepseek": deepseek.MARKS,
        "function_gemma": function_gemma.MARKS,
    }
    return (*calls.get(form, (*bare_json.MARKS, *tagged.MARKS)), *thinking.MARKS)


def make_parser(
    form: str,
    reasoning: str,
    tools: Sequence[Tool],
    *,
    reasoning_begun: bool = False,
    forced: bool = False,
) -> Parser:
    """A parser for one answer.

    ``reasoning_begun``: the prompt ended with the opening tag. ``forced``: a grammar constrained
    the answer to calls.
    """
    # What a grammar produced is not validated again.
    schemas: dict[str, Any] = {tool.name: {} if forced else _readable(tool) for tool in tools}
    parser: Parser
    if form == "harmony" and not forced:
        return HarmonyParser(schemas)
    if not tools:
        parser = Plain()
    elif form in ("llama3", "mistral", "list"):
        parser = BareJsonParser(schemas)
    else:
        parser = TaggedParser(schemas) if forced or form not in OTHERS else OTHERS[form](schemas)
    return ReasoningParser(parser, begun=reasoning_begun) if reasoning == "think" else parser


def _readable(tool: Tool) -> Any:
    """The schema as the grammar reads it; unchanged if it cannot be enforced."""
    try:
        return _parameters(tool)
    except InvalidRequestError:
        return tool.parameters


def call_grammar(
    form: str, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool
) -> Grammar | None:
    """Constrains the answer to the tools.

    With "auto" it is free until a call begins; with "required" (or a name) it is calls and nothing
    else. What "auto" cannot enforce (a schema beyond llguidance) is left to the parser.

    Raises `InvalidRequestError` for an unknown tool name.
    """
    free = choice == "auto"
    try:
        source = _call_source(form, tools, choice, parallel=parallel)
        return None if source is None else Grammar("lark", source, optional=free, origin="tools")
    except InvalidRequestError as error:
        if free:
            return None
        raise (
            error if error.param == "tool_choice" else InvalidRequestError(str(error), "tools")
        ) from None


def _call_source(
    form: str, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool
) -> str | None:
    if choice not in ("auto", "required"):
        tools = [tool for tool in tools if tool.name == choice]
        if not tools:
            raise InvalidRequestError(
                f"tool_choice: there is no tool {choice!r:.100}.", "tool_choice"
            )
    free = choice == "auto"
    if free and (form in ("qwen3_coder", "glm", "llama3", "mistral", "list") or form in OTHERS):
        # XML has no JSON to constrain, and in the others a mask would block the marker tokens; the
        # parser takes whatever comes.
        return None
    if form in ("mistral", "list"):
        item = json.loads(_schema(tools, "arguments"))
        shared = {key: item.pop(key) for key in ("$defs", "x-guidance") if key in item}
        most = {} if parallel else {"maxItems": 1}
        calls: dict[str, Any] = {"type": "array", "minItems": 1, **most, "items": item, **shared}
        return f"start: %json {json.dumps(calls)}"
    if form == "llama3":
        return "\n".join(
            [
                "start: body " + ('(";" body)*' if parallel else ""),
                f"body: %json {_schema(tools, 'parameters')}",
            ]
        )
    body = _schema(tools, "arguments")
    if free:
        times = "*" if parallel else "?"
        rules = [
            f"start: call{times} rest",
            "rest: TEXT",
            r"TEXT: /(.|\n)*/",
            'head[lazy]: TEXT "<tool_call>"',
            r'call: head "\n" body "\n</tool_call>"',
        ]
    else:
        rules = [
            "start: call" + (r' ("\n" call)*' if parallel else ""),
            r'call: "<tool_call>\n" body "\n</tool_call>"',
        ]
    return "\n".join([*rules, f"body: %json {body}"])


def _schema(tools: Sequence[Tool], arguments: str) -> str:
    """One JSON schema for a call of any of the tools.

    Each tool's schema is kept whole among the definitions, so that its references resolve.
    """
    definitions = {
        str(i): _moved(_parameters(tool), f"#/$defs/{i}") for i, tool in enumerate(tools)
    }
    calls = []
    for i, tool in enumerate(tools):
        own = definitions[str(i)] if not _refers(definitions[str(i)]) else {"$ref": f"#/$defs/{i}"}
        properties = {"name": {"const": tool.name}, arguments: own}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    kept = {i: d for i, d in definitions.items() if _refers(d)}
    return json.dumps({**whole, **({"$defs": kept} if kept else {}), "x-guidance": JSON_STYLE})


def _parameters(tool: Tool) -> dict[str, Any]:
    """The enforceable schema of a tool's arguments, always an object.

    Raises `InvalidRequestError`.
    """
    text = json.dumps(tool.parameters or {"type": "object"})
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequestError(
            f"tools: {tool.name}: the parameters have {len(text)} characters; "
            f"the limit is {MAX_SCHEMA_CHARS}.",
            "tools",
        )
    schema = _enforceable(text, tool.name)
    if isinstance(schema, str):
        raise InvalidRequestError(schema, "tools")
    return {"type": "object", **schema}


@lru_cache(MAX_CACHED_SCHEMAS)
def _enforceable(text: str, name: str) -> dict[str, Any] | str:
    """The enforceable schema, or why there is none; cached for the grammar and all parsers."""
    try:
        schema = normalized(json.loads(text), f"tools: {name}", join_one_of=True)
    except InvalidRequestError as error:
        return str(error)
    return schema if isinstance(schema, dict) else {}


def _refers(schema: Any) -> bool:
    return '"$ref"' in json.dumps(schema)


def _moved(schema: Any, root: str) -> Any:
    """The schema moved to another place: references from its root become relative to ``root``."""
    if isinstance(schema, list):
        return [_moved(s, root) for s in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {k: _moved(v, root) for k, v in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = root + target[1:]
    return moved
