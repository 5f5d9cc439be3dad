"""The routes described: OpenAPI 3.1 out of the very schemas that read requests, and a page of it that needs no network. Pure."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import dialect_of
from llmkit.version import __version__

__all__ = ["Route", "describe", "page"]

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": {"type": "string"}, "message": {"type": "string"}}},
        "request_id": {"type": "string"},
    },
}
OLLAMA_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
ERRORS = {"openai": "Error", "anthropic": "AnthropicError", "ollama": "OllamaError"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }
code, pre { font-family: ui-monospace, monospace; } pre { overflow: auto; padding: .8rem; background: #8882; border-radius: 6px; }
summary { cursor: pointer; padding: .3rem 0; } .method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
"""


@dataclass(frozen=True)
class Route:
    """``path`` holds names in braces for what differs; ``{name+}`` may hold slashes. ``also`` are other spellings, ``body`` is what is read, ``tag`` says whose
    words it speaks."""

    method: str
    path: str
    run: Callable[[Exchange], Awaitable[None]]
    summary: str
    tag: str = "llmkit"
    body: type[BaseModel] | None = None
    also: tuple[str, ...] = ()

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        paths = [re.sub(r"\\\{\w+\\\+\\\}", "(.+)", re.sub(r"\\\{\w+\\\}", "([^/]+)", re.escape(p))) for p in (self.path, *self.also)]
        return re.compile("|".join(paths))

    @property
    def template(self) -> str:
        return self.path.replace("+}", "}")


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document."""
    bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    _, shared = models_json_schema([(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.template}").strip("_"),
            "summary": route.summary,
            "tags": [route.tag],
            "responses": {
                "200": {"description": "The answer; with stream, events.", "content": {"application/json": {"schema": {}}}},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ERRORS[dialect_of(route.path)]}"}}},
                },
            },
        }
        names = re.findall(r"\{(\w+)\}", route.template)
        if names:
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        if route.body is not None:
            schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(route.template, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmkit gateway", "version": __version__, "description": "The models that are loaded in notebooks, or by `llmkit serve`."},
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": {**shared.get("$defs", {}), "Error": ERROR, "AnthropicError": ANTHROPIC_ERROR, "OllamaError": OLLAMA_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def page(routes: Sequence[Route]) -> str:
    """The same for people: no script, nothing fetched."""
    schemas = describe(routes)["components"]["schemas"]
    parts = []
    for tag in dict.fromkeys(route.tag for route in routes):
        parts.append(f"<h2>{html.escape(tag)}</h2>")
        for route in (r for r in routes if r.tag == tag):
            head = f'<span class="method">{route.method}</span><code>{html.escape(route.template)}</code> {html.escape(route.summary)}'
            schema = schemas[route.body.__name__] if route.body is not None else None
            body = f"<pre>{html.escape(json.dumps(schema, indent=2))}</pre>" if schema is not None else "<p>No body.</p>"
            parts.append(f"<details><summary>{head}</summary>{body}</details>")
    title = f"llmkit gateway {__version__}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f'<p>Send the key as <code>Authorization: Bearer KEY</code> or <code>x-api-key</code>. For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(parts)}</body></html>"
    )
