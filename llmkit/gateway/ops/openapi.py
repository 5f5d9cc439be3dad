"""The description of the routes: OpenAPI 3.1, generated from the schemas that read the requests.

Pure. Knows the table of routes, not what they do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmkit.gateway.access.identity import ADMIN, INFERENCE
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import Dialect
from llmkit.gateway.web import docs_page
from llmkit.version import __version__

__all__ = ["Query", "Route", "describe", "page"]

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
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}
LLAMA_SERVER_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type"],
            "properties": {
                "code": {"type": "integer"},
                "message": {"type": "string"},
                "type": {"type": "string"},
            },
        }
    },
}
LLMS_ERROR = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}
OLLAMA_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
ERRORS = {
    "openai": "Error",
    "anthropic": "AnthropicError",
    "ollama": "OllamaError",
    "llama-server": "LlamaServerError",
    "llms": "LlmsError",
    "llmkit": "Error",
}


BY_TAG: dict[str, Dialect] = {
    "Anthropic": "anthropic",
    "Ollama": "ollama",
    "llama-server": "llama-server",
}


@dataclass(frozen=True)
class Query:
    """A parameter of a query: what it is for, and the JSON schema of its value."""

    name: str
    what: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})

    @classmethod
    def number(cls, name: str, what: str, most: int, default: int) -> Query:
        """One from 1 to ``most``."""
        bounds = {"minimum": 1, "maximum": most, "default": default}
        return cls(name, what, {"type": "integer", **bounds})

    @classmethod
    def choice(cls, name: str, what: str, *values: str) -> Query:
        """One of these."""
        return cls(name, what, {"type": "string", "enum": list(values)})


@dataclass(frozen=True)
class Route:
    """A method and a path, and what runs for it.

    ``path`` has parameters in braces; only ``{name+}`` matches slashes. ``also`` are further paths,
    ``body`` is the schema of the request (or ``or_body``, another dialect's), ``tag`` the dialect.
    ``scope`` is what callers need; by default ``admin`` below /admin, else ``inference`` for what
    computes and nothing for a look. What ``relays`` only passes on what an exchange of its own,
    which passes the stages, comes to. ``dialect`` is whose shape its errors have, by default the
    tag's; with ``or_body`` they may have that of ``or_dialect``. ``query`` is what it reads of an
    address behind the question mark.
    """

    method: str
    path: str
    run: Callable[[Exchange], Awaitable[None]]
    summary: str
    tag: str = "llmkit"
    body: type[BaseModel] | None = None
    or_body: type[BaseModel] | None = None
    also: tuple[str, ...] = ()
    scope: str | None = None
    relays: bool = False
    dialect: Dialect | None = None
    or_dialect: Dialect | None = None
    query: tuple[Query, ...] = ()
    media: str = "application/json"  # of the body

    @property
    def errors(self) -> Dialect:
        """Whose shape its errors have."""
        return self.dialect or BY_TAG.get(self.tag, "openai")

    @property
    def needs(self) -> str:
        """The scope that callers need; empty means any."""
        if self.scope is not None:
            return self.scope
        if self.path.startswith("/admin/"):
            return ADMIN
        return "" if self.method == "GET" else INFERENCE

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        paths = [
            re.sub(r"\\\{\w+\\\+\\\}", "(.+)", re.sub(r"\\\{\w+\\\}", "([^/]+)", re.escape(p)))
            for p in (self.path, *self.also)
        ]
        return re.compile("|".join(paths))

    @property
    def template(self) -> str:
        return self.path.replace("+}", "}")


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document."""
    every = [body for route in routes for body in (route.body, route.or_body)]
    bodies = list(dict.fromkeys(body for body in every if body is not None))
    _, shared = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.template}").strip(
                "_"
            ),
            "summary": route.summary,
            "tags": [route.tag],
            "responses": {
                "200": {
                    "description": "The answer; with stream, events.",
                    "content": {"application/json": {"schema": {}}},
                },
                "default": {
                    "description": "An error.",
                    "content": {
                        "application/json": {
                            "schema": _one_of(
                                ERRORS[each]
                                for each in (route.errors, route.or_dialect)
                                if each is not None
                            )
                        }
                    },
                },
            },
        }
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)\}", route.template)
        ] + [
            {"name": q.name, "in": "query", "description": q.what, "schema": dict(q.schema)}
            for q in route.query
        ]
        if parameters:
            operation["parameters"] = parameters
        if route.body is not None:
            bodies_of = (route.body, route.or_body)
            schema = _one_of(body.__name__ for body in bodies_of if body is not None)
            operation["requestBody"] = {
                "required": True,
                "content": {route.media: {"schema": schema}},
            }
        paths.setdefault(route.template, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llmkit gateway",
            "version": __version__,
            "description": "The models that are loaded in notebooks, or by `llmkit serve`.",
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": {
                **shared.get("$defs", {}),
                "Error": ERROR,
                "AnthropicError": ANTHROPIC_ERROR,
                "OllamaError": OLLAMA_ERROR,
                "LlamaServerError": LLAMA_SERVER_ERROR,
                "LlmsError": LLMS_ERROR,
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _one_of(names: Iterable[str]) -> dict[str, Any]:
    """Any of these schemas."""
    found = [{"$ref": f"#/components/schemas/{name}"} for name in dict.fromkeys(names)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def page(routes: Sequence[Route]) -> str:
    """The same for people: no script, nothing to fetch."""
    schemas = describe(routes)["components"]["schemas"]
    return docs_page(
        [
            {
                "tag": route.tag,
                "method": route.method,
                "path": route.template,
                "summary": route.summary,
                "schema": None
                if route.body is None
                else json.dumps(schemas[route.body.__name__], indent=2),
            }
            for route in routes
        ]
    )
