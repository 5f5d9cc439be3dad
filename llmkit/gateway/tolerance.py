"""Fields that well-known clients send, that cannot be honoured here, and whose absence makes no answer wrong: one table.

They are taken out of a body before its schema sees it, named in the header ``x-llmkit-ignored`` and, once for each, in the log. A field found neither
here nor in a schema is a 400. ``strict`` refuses these too.

A path names a field by its place: ``a.b`` a field of an object, ``a[].b`` that of each object of a list, ``a[type=x].b`` of those of a type (``*`` at the end
stands for any rest); a path that ends in ``]`` takes out whole entries. ``=x|y`` at the end ignores these values only, ``=[]`` what is empty.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from llmkit.errors import InvalidRequestError

__all__ = ["Tolerance"]

logger = logging.getLogger("llmkit.gateway")

CHAT_EXTRAS = (  # proxies and aggregators add them to OpenAI's chat
    "store=true", "prediction", "web_search_options", "usage", "snippy", "keep_alive", "cache_prompt", "timings_per_token", "id_slot", "verbosity=low|high",
    "service_tier=flex|priority|scale", "thinking_budget", "prompt_cache_options", "functions=[]",
    "messages[].cache_control", "messages[].content[].cache_control", "messages[].copilot_cache_control", "messages[].reasoning_details",
    "messages[].reasoning_opaque", "messages[].thinking_blocks", "messages[].provider_specific_fields", "messages[].phase",
    "messages[].tool_calls[].extra_content", "messages[].tool_calls[].cache_control", "messages[].tool_calls[].provider_specific_fields",
    "messages[].content[].prompt_cache_breakpoint", "tools[].cache_control", "tools[].function.cache_control",
)  # fmt: skip
COUNT_MESSAGES = (  # Claude Code, Anthropic's SDKs
    "context_management", "output_config.task_budget", "thinking.budget_tokens", "thinking.block_binding", "speed", "inference_geo", "diagnostics",
    "safeguards", "context_hint", "fallbacks", "fallback_credit_token", "betas", "user_profile_id", "mcp_servers=[]", "container=[]",
    "messages[].clear_at", "messages[].output_config", "messages[].content[].cache_control", "messages[].content[type=redacted_thinking]",
    "messages[].content[].content[].cache_control", "system[].cache_control",
    "tools[].defer_loading", "tools[].allowed_callers", "tools[].input_examples", "tools[].citations",
    "tools[type=web_search_*]", "tools[type=web_fetch_*]", "tools[type=code_execution_*]", "tools[type=tool_search_tool_*]", "tools[type=advisor_*]",
)  # fmt: skip
RESPONSES = (  # Codex, OpenAI's SDKs and agents, Copilot
    "include[reasoning.encrypted_content|web_search_call.action.sources|web_search_call.results]",
    "reasoning.summary", "reasoning.generate_summary", "reasoning.context", "client_metadata", "context_management", "prompt_cache_options", "access_programs",
    "request_country", "stream_options.reasoning_summary_delivery", "max_tool_calls", "text.verbosity=low|high", "service_tier=flex|priority|scale",
    "tools[].defer_loading", "tools[type=web_search*]", "tools[type=image_generation]", "tools[type=file_search]", "tools[type=code_interpreter]",
    "tools[type=mcp]", "tools[type=local_shell]", "tools[type=shell]", "tools[type=tool_search]", "tools[type=custom]",
    "tools[type=namespace]",
    "input[].internal_chat_message_metadata_passthrough", "input[].content[].prompt_cache_breakpoint", "input[type=reasoning].encrypted_content",
    "input[type=function_call].encrypted_function_args", "input[type=web_search_call]", "input[type=image_generation_call]",
    "input[type=configuration_update]", "input[type=ghost_snapshot]",
)  # fmt: skip
RUNTIME = "|".join((  # of Ollama's options: how a model is loaded, which has happened
    "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa", "low_vram", "f16_kv", "vocab_only", "logits_all", "embedding_only",
    "draft_num_predict", "num_keep", "tfs_z", "penalize_newline", "num_gqa", "rope_frequency_base", "rope_frequency_scale",
))  # fmt: skip
OLLAMA = (f"options.{RUNTIME}", "truncate", "shift", "logprobs=false", "top_logprobs=0", "template=[]", "context=[]", "messages[].images=[]", "images=[]")
# By the schema of a body.
TABLE: dict[str, tuple[str, ...]] = {
    "ChatRequest": CHAT_EXTRAS,
    "CompletionRequest": ("cache_prompt", "timings_per_token", "id_slot", "store=true", "service_tier=flex|priority|scale"),
    "CountBody": COUNT_MESSAGES,
    "MessagesBody": COUNT_MESSAGES,
    "ResponsesBody": RESPONSES,
    "ChatBody": OLLAMA,
    "GenerateBody": OLLAMA,
    "EmbedBody": (f"options.{RUNTIME}|num_ctx|temperature|top_k|top_p|seed|stop|num_predict|repeat_penalty|repeat_last_n|mirostat|mirostat_eta|mirostat_tau",),
    "OldEmbedBody": (
        f"options.{RUNTIME}|num_ctx|temperature|top_k|top_p|seed|stop|num_predict|repeat_penalty|repeat_last_n|mirostat|mirostat_eta|mirostat_tau",
    ),
    "ShowBody": ("system", "template", "options"),
}
SEGMENT = re.compile(r"(?P<name>[\w*|]+)(?:\[(?P<entries>[^\]]*)\])?(?:=(?P<values>.*))?")


class Tolerance:
    """Takes the fields of the table out of bodies."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._logged: set[str] = set()
        self._lock = threading.Lock()
        self._rules = {schema: [(path, _segments(path)) for path in paths] for schema, paths in TABLE.items()}

    def strip(self, schema: type[BaseModel], data: dict[str, Any]) -> list[str]:
        """Change ``data``; what was taken out, by its path. Raises `InvalidRequestError` for it when ``strict``."""
        found: list[str] = []
        for _, segments in self._rules.get(schema.__name__, ()):
            found += dict.fromkeys(_take(data, segments, ""))
        for name in found:
            self.note(name)
        return found

    def note(self, name: str) -> None:
        """A field has no effect: logged once, or refused when ``strict``. Raises `InvalidRequestError`."""
        if self._strict:
            raise InvalidRequestError(f"{name} is not supported here (strict is on, so nothing is ignored).", name.split(".")[0].split("[")[0])
        with self._lock:
            new = name not in self._logged
            self._logged.add(name)
        if new:
            logger.info("ignoring %s in requests: it is not supported, and does not affect the answer", name)


def unnoticed(_: str) -> None:
    """What takes the name of an ignored field where nobody wants to know."""


def _segments(path: str) -> list[re.Match[str]]:
    """A path in its parts; dots within brackets and values belong to them."""
    parts = re.findall(r"(?:[^.\[=]|\[[^\]]*\]|=.*$)+", path)
    return [match for part in parts if (match := SEGMENT.fullmatch(part)) is not None]


def _take(place: Any, segments: list[re.Match[str]], where: str) -> Iterator[str]:
    """Remove what the path names below ``place``; the names of what was removed."""
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
                        yield from _take(entry, rest, f"{path}[{here['entries'].removeprefix('type=')}].")
            else:
                gone = [e for e in value if _is_of(e, here["entries"])]
                if gone:
                    place[name] = [e for e in value if not _is_of(e, here["entries"])]
                    # Of texts that are listed in the table the text itself, else the table's own words: what a caller made up goes into no header.
                    yield from (f"{path}[{e if isinstance(e, str) else here['entries'].removeprefix('type=')}]" for e in gone)
                    if not place[name]:
                        del place[name]
        elif here["entries"] is None and rest:
            yield from _take(value, rest, f"{path}.")
            if isinstance(value, dict) and not value and name in place and rest:
                del place[name]
        elif here["entries"] is None and _is_one_of(value, here["values"]):
            del place[name]
            yield path if name == here["name"] or "*" not in here["name"] else f"{where}{here['name']}"


def _is_of(entry: Any, wanted: str) -> bool:
    """Whether an entry of a list is meant: any, those of a type, or these texts."""
    if not wanted:
        return True
    if wanted.startswith("type="):
        return isinstance(entry, dict) and isinstance(entry.get("type"), str) and fnmatchcase(entry["type"], wanted.removeprefix("type="))
    return isinstance(entry, str) and entry in wanted.split("|")


def _is_one_of(value: Any, wanted: str | None) -> bool:
    if wanted is None:
        return value is not None
    if wanted == "[]":
        return value in ([], {}, "")
    text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, bool | int) else None
    return text in wanted.split("|")
