"""Fields of well-known clients that are ignored: unsupported, but no answer depends on them.

They are removed from a body before its schema sees it, and named in the header ``x-llmkit-ignored``
and, once each, in the log. A field that is neither in this table nor in the schema is a 400;
``strict`` refuses the table's fields too. Pure; runs on the Tornado loop or on a lane.

A path locates a field: ``a.b`` in an object, ``a[].b`` in every object of a list, ``a[type=x].b``
in those of one type (a ``*`` at its end matches any rest). A path that ends in ``]`` removes whole
entries. ``=x|y`` at the end ignores only these values, ``=[]`` only empty ones.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from llmkit.errors import InvalidRequestError

__all__ = ["Tolerance", "unnoticed"]

Segments = list[re.Match[str]]  # a path taken apart
logger = logging.getLogger("llmkit.gateway")

CHAT_EXTRAS = (  # added by proxies and aggregators to OpenAI's chat
    "store=true", "prediction", "web_search_options", "usage", "snippy", "keep_alive",
    "cache_prompt", "id_slot", "return_progress", "sse_ping_interval", "reasoning_control",
    "thinking_budget_tokens", "reasoning_format=auto|deepseek", "backend_sampling=false",
    "dynatemp_range=0|0.0", "dynatemp_exponent=1|1.0", "typ_p=1|1.0", "verbosity=low|high",
    "service_tier=flex|priority|scale", "thinking_budget", "prompt_cache_options", "functions=[]",
    "messages[].cache_control", "messages[].content[].cache_control",
    "messages[].copilot_cache_control", "messages[].reasoning_details",
    "messages[].reasoning_opaque", "messages[].thinking_blocks",
    "messages[].provider_specific_fields", "messages[].phase",
    "messages[].tool_calls[].extra_content", "messages[].tool_calls[].cache_control",
    "messages[].tool_calls[].provider_specific_fields",
    "messages[].content[].prompt_cache_breakpoint", "tools[].cache_control",
    "tools[].function.cache_control",
)  # fmt: skip
MESSAGES = (  # Claude Code, Anthropic's SDKs
    "context_management", "output_config.task_budget", "thinking.budget_tokens",
    "thinking.block_binding", "speed", "inference_geo", "diagnostics", "safeguards",
    "context_hint", "fallbacks", "fallback_credit_token", "betas", "user_profile_id",
    "mcp_servers=[]", "container=[]", "messages[].clear_at", "messages[].output_config",
    "messages[].content[].cache_control", "messages[].content[type=redacted_thinking]",
    "messages[].content[].content[].cache_control", "system[].cache_control",
    "tools[].defer_loading", "tools[].allowed_callers", "tools[].input_examples",
    "tools[].citations", "tools[type=web_search_*]", "tools[type=web_fetch_*]",
    "tools[type=code_execution_*]", "tools[type=tool_search_tool_*]", "tools[type=advisor_*]",
)  # fmt: skip
RESPONSES = (  # Codex, OpenAI's SDKs and agents, Copilot
    "include[reasoning.encrypted_content|web_search_call.action.sources|web_search_call.results]",
    "reasoning.summary", "reasoning.generate_summary", "reasoning.context", "client_metadata",
    "context_management", "prompt_cache_options", "access_programs", "request_country",
    "stream_options.reasoning_summary_delivery", "max_tool_calls", "text.verbosity=low|high",
    "service_tier=flex|priority|scale", "tools[].defer_loading", "tools[type=web_search*]",
    "tools[type=image_generation]", "tools[type=file_search]", "tools[type=code_interpreter]",
    "tools[type=mcp]", "tools[type=local_shell]", "tools[type=shell]", "tools[type=tool_search]",
    "tools[type=custom]", "tools[type=namespace]",
    "input[].internal_chat_message_metadata_passthrough",
    "input[].content[].prompt_cache_breakpoint", "input[type=reasoning].encrypted_content",
    "input[type=function_call].encrypted_function_args", "input[type=web_search_call]",
    "input[type=image_generation_call]", "input[type=configuration_update]",
    "input[type=ghost_snapshot]",
)  # fmt: skip
RUNTIME = "|".join((  # Ollama's options for loading a model; it is loaded already
    "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa", "low_vram",
    "f16_kv", "vocab_only", "logits_all", "embedding_only", "draft_num_predict", "num_keep",
    "tfs_z", "penalize_newline", "num_gqa", "rope_frequency_base", "rope_frequency_scale",
))  # fmt: skip
SAMPLING = "|".join((  # Ollama's options for generation, which embedding does not use
    "num_ctx", "temperature", "top_k", "top_p", "seed", "stop", "num_predict", "repeat_penalty",
    "repeat_last_n", "mirostat", "mirostat_eta", "mirostat_tau",
))  # fmt: skip
OLLAMA = (
    f"options.{RUNTIME}",
    "truncate",
    "shift",
    "logprobs=false",
    "top_logprobs=0",
    "template=[]",
    "context=[]",
    "messages[].images=[]",
    "images=[]",
)
LLAMA_SERVER = (  # how llama-server is to compute
    "cache_prompt", "id_slot", "n_keep", "n_discard", "n_cache_reuse", "return_progress",
    "min_keep", "sse_ping_interval", "t_max_prompt_ms", "backend_sampling=false",
    "post_sampling_probs=false", "verbose", "stream_options", "dynatemp_range=0|0.0",
    "dynatemp_exponent=1|1.0", "top_n_sigma=-1|-1.0", "adaptive_target=-1|-1.0",
    "adaptive_decay", "reasoning_format", "reasoning_control", "grammar_lazy=false",
    "chat_format", "echo=false", "user",
)  # fmt: skip
TABLE: dict[str, tuple[str, ...]] = {  # by the schema of the body
    "ChatRequest": CHAT_EXTRAS,
    "CompletionRequest": (
        "cache_prompt",
        "id_slot",
        "store=true",
        "service_tier=flex|priority|scale",
    ),
    "PlainCompletionRequest": ("cache_prompt", "id_slot", "store=true"),
    "PromptedChatBody": ("user",),
    "GenerateEventsBody": ("sampling_params.n_keep", "sampling_params.tfs_z=1|1.0"),
    "LlamaCompletionBody": LLAMA_SERVER,
    "InfillBody": LLAMA_SERVER,
    "LlamaEmbeddingBody": ("encoding_format=float", "user"),
    "CountBody": MESSAGES,
    "MessagesBody": MESSAGES,
    "ResponsesBody": RESPONSES,
    "ChatBody": OLLAMA,
    "GenerateBody": OLLAMA,
    "EmbedBody": (f"options.{RUNTIME}|{SAMPLING}",),
    "OldEmbedBody": (f"options.{RUNTIME}|{SAMPLING}",),
    "ShowBody": ("system", "template", "options"),
}
SEGMENT = re.compile(r"(?P<name>[\w*|]+)(?:\[(?P<entries>[^\]]*)\])?(?:=(?P<values>.*))?")


class Tolerance:
    """Removes the fields of the table from bodies."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        self._rules = {schema: _by_name(paths) for schema, paths in TABLE.items()}

    def strip(self, schema: type[BaseModel], data: dict[str, Any]) -> list[str]:
        """Remove fields from ``data``; returns their paths.

        With ``strict``, raises `InvalidRequestError` instead of returning any.
        """
        removed: list[str] = []
        names, patterns = self._rules.get(schema.__name__, ({}, []))
        rules = [rule for name in data for rule in names.get(name, ())]
        for segments in (*rules, *patterns):
            removed += dict.fromkeys(_take(data, segments, ""))
        for name in removed:
            self.note(name)
        return removed

    def note(self, name: str) -> None:
        """Log once that a field has no effect. With ``strict``, raises `InvalidRequestError`."""
        if self._strict:
            raise InvalidRequestError(
                f"{name} is not supported (strict mode ignores no fields).",
                name.split(".")[0].split("[")[0],
            )
        with self._lock:
            new = name not in self._logged
            self._logged.add(name)
        if new:
            logger.info(
                "ignoring %s in requests: it is unsupported and does not affect answers", name
            )


def unnoticed(_: str) -> None:
    """Discards the name of an ignored field."""


def _by_name(paths: Iterable[str]) -> tuple[dict[str, list[Segments]], list[Segments]]:
    """Paths by the field that they begin with, and those that begin with a pattern."""
    names: dict[str, list[Segments]] = {}
    patterns = []
    for path in paths:
        segments = _segments(path)
        name = segments[0]["name"]
        if "|" in name or "*" in name:
            patterns.append(segments)
        else:
            names.setdefault(name, []).append(segments)
    return names, patterns


def _segments(path: str) -> Segments:
    """The parts of a path. Dots inside brackets and values do not separate."""
    parts = re.findall(r"(?:[^.\[=]|\[[^\]]*\]|=.*$)+", path)
    return [match for part in parts if (match := SEGMENT.fullmatch(part)) is not None]


def _take(place: Any, segments: Segments, where: str) -> Iterator[str]:
    """Remove what the path matches below ``place``; yields the paths of what was removed."""
    if not isinstance(place, dict):
        return
    here, rest = segments[0], segments[1:]
    for name in (
        [n for n in place if any(fnmatchcase(n, each) for each in here["name"].split("|"))]
        if "|" in here["name"] or "*" in here["name"]
        else ([here["name"]] if here["name"] in place else [])
    ):
        value, path = place[name], f"{where}{name}"
        if here["entries"] is not None and isinstance(value, list):
            if rest:
                for entry in value:
                    if isinstance(entry, dict) and _is_of(entry, here["entries"]):
                        yield from _take(
                            entry, rest, f"{path}[{here['entries'].removeprefix('type=')}]."
                        )
            else:
                removed = [e for e in value if _is_of(e, here["entries"])]
                if removed:
                    place[name] = [e for e in value if not _is_of(e, here["entries"])]
                    # Only names from the table: nothing a caller made up may go into a header.
                    kind = here["entries"].removeprefix("type=")
                    yield from (f"{path}[{e if isinstance(e, str) else kind}]" for e in removed)
                    if not place[name]:
                        del place[name]
        elif here["entries"] is None and rest:
            yield from _take(value, rest, f"{path}.")
            if isinstance(value, dict) and not value and name in place and rest:
                del place[name]
        elif here["entries"] is None and _is_one_of(value, here["values"]):
            del place[name]
            yield (
                path
                if name == here["name"] or "*" not in here["name"]
                else f"{where}{here['name']}"
            )


def _is_of(entry: Any, pattern: str) -> bool:
    """Whether an entry of a list matches: any, those of a type, or these strings."""
    if not pattern:
        return True
    if pattern.startswith("type="):
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("type"), str)
            and fnmatchcase(entry["type"], pattern.removeprefix("type="))
        )
    return isinstance(entry, str) and entry in pattern.split("|")


def _is_one_of(value: Any, values: str | None) -> bool:
    if values is None:
        return value is not None
    if values == "[]":
        return value in ([], {}, "")
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value)
        if isinstance(value, bool | int | float)
        else None
    )
    return text in values.split("|")
