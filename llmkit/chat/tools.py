"""Tools of a chat: which form a model writes its calls in, how it is told of them where its template does not, and the grammar that holds it to them. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from llmkit.types import Grammar, Message, Tool

__all__ = ["FORMATS", "call_grammar", "describe_tools", "make_parser", "marks", "reasoning_form", "tool_form"]

# Llama 3 writes bare JSON with "parameters", Granite and Phi ("list") a list of calls; the XML of Qwen3-Coder stands in the tags of Hermes; "general" is ours,
# for templates that know no tools. Of "harmony", "deepseek" and "function_gemma" no grammar holds the calls: forced ones are written in the general form.
FORMATS = ("hermes", "qwen3_coder", "llama3", "mistral", "list", "harmony", "deepseek", "function_gemma", "general")
OTHERS: dict[str, Callable[[dict[str, Any]], Parser]] = {"harmony": HarmonyParser, "deepseek": DeepSeekParser, "function_gemma": FunctionGemmaParser}
ToolChoice = Literal["auto", "required"] | str
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
RESULT = "<tool_response>"
TOOLS_PROMPT = """You can call functions. These are there, each with the JSON schema of its arguments:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between tags, and nothing else:
<tool_call>
{{"name": "the function's name", "arguments": {{}}}}
</tool_call>"""


def tool_form(template: str) -> str:
    """The form of calls that a template speaks of."""
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
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return "general"


def reasoning_form(template: str) -> str:
    """ "think" where the model reasons between ``<think>`` tags, "harmony" where it does in a channel, else nothing."""
    if tool_form(template) == "harmony":
        return "harmony"
    return "think" if "<think>" in template or "</think>" in template else ""


def marks(form: str) -> tuple[str, ...]:
    """Control tokens that the parser of a form must see as text."""
    calls = {"harmony": harmony.MARKS, "deepseek": deepseek.MARKS, "function_gemma": function_gemma.MARKS}
    return (*calls.get(form, (*bare_json.MARKS, *tagged.MARKS)), *thinking.MARKS)


def make_parser(form: str, reasoning: str, tools: Sequence[Tool], *, reasoning_begun: bool = False, forced: bool = False) -> Parser:
    """A parser for one answer. ``reasoning_begun``: the prompt ended with the opening tag. ``forced``: a grammar held the answer to calls."""
    schemas = {tool.name: tool.parameters for tool in tools}
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


def describe_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation for a template that knows no tools: they stand in the system message, calls and results in plain messages."""
    text = TOOLS_PROMPT.format(tools="\n".join(json.dumps(tool.function()) for tool in tools)) if tools else ""
    plain: list[Message] = []
    for message in messages:
        now = _plain(message)
        if plain and now.role == plain[-1].role == "user" and RESULT in plain[-1].content + now.content:
            now = Message("user", f"{plain.pop().content}\n\n{now.content}")  # many templates want the roles to alternate
        plain.append(now)
    if not text:
        return plain
    if plain and plain[0].role in ("system", "developer"):
        return [replace(plain[0], content=f"{plain[0].content}\n\n{text}" if plain[0].content else text), *plain[1:]]
    return [Message("system", text), *plain]


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"{RESULT}\n{message.content}\n</tool_response>")
    if message.tool_calls:
        calls = [f'<tool_call>\n{{"name": {json.dumps(c.name)}, "arguments": {c.arguments}}}\n</tool_call>' for c in message.tool_calls]
        return Message(message.role, "\n".join([*([message.content] if message.content else []), *calls]))
    return message


def call_grammar(form: str, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> Grammar | None:
    """Holds the answer to the tools: with "auto" it is free until a call begins, with "required" (or a name) it is calls and nothing else. What "auto" cannot
    hold (a schema beyond llguidance) is left to the parser.

    Raises `InvalidRequestError` for a name that is no tool.
    """
    free = choice == "auto"
    try:
        source = _call_source(form, tools, choice, parallel=parallel)
        return None if source is None else Grammar("lark", source, optional=free, origin="tools")
    except InvalidRequestError as error:
        if free:
            return None
        raise error if error.param == "tool_choice" else InvalidRequestError(f"tools: {error}", "tools") from None


def _call_source(form: str, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> str | None:
    if choice not in ("auto", "required"):
        tools = [tool for tool in tools if tool.name == choice]
        if not tools:
            raise InvalidRequestError(f"tool_choice: there is no tool {choice!r:.100}.", "tool_choice")
    free = choice == "auto"
    if free and (form in ("qwen3_coder", "llama3", "mistral", "list") or form in OTHERS):
        return None  # XML holds no JSON for a schema, and of the others a mask would take the marks away; the parser takes what comes
    if form in ("mistral", "list"):
        item = json.loads(_schema(tools, "arguments"))
        shared = {key: item.pop(key) for key in ("$defs", "x-guidance") if key in item}
        return f"start: %json {json.dumps({'type': 'array', 'minItems': 1, **({} if parallel else {'maxItems': 1}), 'items': item, **shared})}"
    if form == "llama3":
        return "\n".join(["start: body " + ('(";" body)*' if parallel else ""), f"body: %json {_schema(tools, 'parameters')}"])
    body = _schema(tools, "arguments")
    if free:
        times = "*" if parallel else "?"
        rules = [f"start: call{times} rest", "rest: TEXT", r"TEXT: /(.|\n)*/", 'head[lazy]: TEXT "<tool_call>"', r'call: head "\n" body "\n</tool_call>"']
    else:
        rules = ["start: call" + (r' ("\n" call)*' if parallel else ""), r'call: "<tool_call>\n" body "\n</tool_call>"']
    return "\n".join([*rules, f"body: %json {body}"])


def _schema(tools: Sequence[Tool], arguments: str) -> str:
    """One JSON schema for a call of any of the tools. Each tool's own stands whole among the definitions, so that what it refers to is found."""
    definitions = {str(i): _moved(dict(tool.parameters) or {"type": "object"}, f"#/$defs/{i}") for i, tool in enumerate(tools)}
    calls = []
    for i, tool in enumerate(tools):
        own = definitions[str(i)] if not _refers(definitions[str(i)]) else {"$ref": f"#/$defs/{i}"}
        properties = {"name": {"const": tool.name}, arguments: own}
        calls.append({"type": "object", "properties": properties, "required": ["name", arguments], "additionalProperties": False})
    whole: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    kept = {i: d for i, d in definitions.items() if _refers(d)}
    return json.dumps({**whole, **({"$defs": kept} if kept else {}), "x-guidance": JSON_STYLE})


def _refers(schema: Any) -> bool:
    return '"$ref"' in json.dumps(schema)


def _moved(schema: Any, root: str) -> Any:
    """The same schema for another place: what it refers to from its root it refers to from ``root``."""
    if isinstance(schema, list):
        return [_moved(s, root) for s in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {k: _moved(v, root) for k, v in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = root + target[1:]
    return moved
