"""The gateway's routes as files that clients of HTTP open: a Postman collection (v2.1) and a .http
file for editors, made from the OpenAPI document.

`python .ci/requests.py` writes them to docs/reference; tests/test_requests.py checks that they are
current and that the server takes their bodies.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
POSTMAN, HTTP = FOLDER / "llmkit.postman_collection.json", FOLDER / "llmkit.http"
SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
BASE_URL, KEY = "http://127.0.0.1:3000", "KEY"
QUESTION = "Why is the sky blue?"
# A value for a field, by its name; only required fields are filled in, and those of USUAL.
SAMPLES: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 64,
    "max_completion_tokens": 64,
    "max_output_tokens": 64,
    "prompt": QUESTION,
    "input": QUESTION,
    "content": QUESTION,
    "text": QUESTION,
    "query": "colour of the sky",
    "documents": ["The sky is blue.", "Grass is green."],
    "tokens": [1, 2, 3],
    "n_predict": 64,
    "model_name": "default",
    "model_path": "model.gguf",
    "path": "model.gguf",
    "name": "default",
    "title": "Skies",
    "file": "speech.wav",
    "image": "photo.png",
}
USUAL = ("model", "messages", "prompt", "input", "content", "max_tokens", "max_output_tokens")
USUAL = (*USUAL, "n_predict")
# What the name of a field does not tell, by method and path.
BODIES: dict[str, Any] = {
    "POST /api/pull": {"model": "unsloth/Qwen3-0.6B-GGUF:Q4_K_M", "stream": False},
    "POST /admin/storage/pull": {"name": "unsloth/Qwen3-0.6B-GGUF:Q4_K_M"},
    "POST /v1/sessions/import": {"messages": SAMPLES["messages"]},
    "POST /infill": {
        "model": "default",
        "input_prefix": "def add(a, b):\n    ",
        "input_suffix": "\n",
        "n_predict": 64,
    },
    "POST /engine/embed": {"request_id": "vectors-1", "inputs": [QUESTION]},
    "POST /engine/inquire": {
        "request_id": "ask-1",
        "kind": "tokenize",
        "question": {"text": QUESTION},
    },
    "POST /engine/submit": {
        "request_id": "answer-1",
        "prompt": QUESTION,
        "sampling": {"max_tokens": 64},
    },
    "POST /lora-adapters": [{"id": 0, "scale": 0.5}],
}
# Of these one is enough, the first that there is.
ALIKE = ("content", "input", "messages", "prompt")
NOT_SUPPORTED = "Not supported"
FORM, FILES = "multipart/form-data", ("file", "image")  # and its fields that are files
# Parameters of paths.
PLACES = {"id": "default", "name": "base.css"}


@dataclass(frozen=True)
class Request:
    """One operation; ``names`` are the parameters of its path, a form's body has a file."""

    method: str
    path: str
    summary: str
    tag: str
    names: tuple[str, ...]
    body: Any
    is_form: bool = False


async def document() -> dict[str, Any]:
    """The OpenAPI document of a server that offers everything."""
    from llmkit.gateway.composition import Composition
    from llmkit.gateway.ops.openapi import describe
    from llmkit.gateway.workers import Workers
    from llmkit.settings.gateway import GatewayOptions
    from llmkit.settings.serving import ServeSettings

    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:///{folder}/llmkit.db"
        options = GatewayOptions(admin=True, models_dir=folder, db_url=database)
        workers = Workers(options, [], start=False)
        parts = Composition(ServeSettings(options), workers.directory, workers)
        try:
            return describe(parts.gateway.routes)
        finally:
            await parts.close()
            workers.directory.close()


def requests(openapi: dict[str, Any]) -> list[Request]:
    """All operations, by tag and in the order of the document."""
    found = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            form = content.get(FORM, {}).get("schema")
            schema = content.get("application/json", {}).get("schema", form)
            key = f"{method.upper()} {path}"
            body = None if schema is None else _sample(schema, openapi)
            names = tuple(re.findall(r"\{(\w+)\}", path))
            tag, summary = operation["tags"][0], operation["summary"]
            if summary == NOT_SUPPORTED:
                continue
            body = BODIES.get(key, body)
            is_form = form is not None
            found.append(Request(method.upper(), path, summary, tag, names, body, is_form))
    tags = list(dict.fromkeys(request.tag for request in found))
    return sorted(found, key=lambda request: tags.index(request.tag))


def _sample(schema: dict[str, Any], openapi: dict[str, Any], name: str = "") -> Any:
    """A value that a schema takes."""
    if "$ref" in schema:
        target = schema["$ref"].rpartition("/")[2]
        return _sample(openapi["components"]["schemas"][target], openapi, name)
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if choices:
        return _sample(next(c for c in choices if c.get("type") != "null"), openapi, name)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if schema.get("properties"):
        return _object(schema, openapi)
    kinds = {"string": "text", "integer": 1, "number": 1.0, "boolean": False, "array": []}
    return kinds.get(str(schema.get("type")), {})


def _object(schema: dict[str, Any], openapi: dict[str, Any]) -> dict[str, Any]:
    properties, required = schema["properties"], schema.get("required", ())
    spare = [key for key in ALIKE if key in properties and key not in required]
    spare = spare if any(key in required for key in ALIKE) else spare[1:]
    wanted = {*required, *USUAL} - {*spare}
    return {
        key: SAMPLES.get(key.replace("-", "_")) or _sample(below, openapi, key)
        for key, below in properties.items()
        if key in wanted
    }


def postman(found: list[Request]) -> dict[str, Any]:
    """The collection, a folder for each tag."""
    folders: dict[str, list[Any]] = {}
    for request in found:
        folders.setdefault(request.tag, []).append(_item(request))
    return {
        "info": {
            "name": "llmkit gateway",
            "description": "The routes of `llmkit serve`, made from its OpenAPI document.",
            "schema": SCHEMA,
        },
        "auth": {"type": "bearer", "bearer": [_variable("token", "{{key}}")]},
        "variable": [_variable("base_url", BASE_URL), _variable("key", KEY)],
        "item": [{"name": tag, "item": items} for tag, items in folders.items()],
    }


def _variable(key: str, value: str) -> dict[str, str]:
    return {"key": key, "value": value, "type": "string"}


def _item(request: Request) -> dict[str, Any]:
    path = re.sub(r"\{(\w+)\}", r":\1", request.path)
    url: dict[str, Any] = {
        "raw": "{{base_url}}" + path,
        "host": ["{{base_url}}"],
        "path": path.strip("/").split("/") if path != "/" else [""],
    }
    if request.names:
        url["variable"] = [{"key": n, "value": PLACES.get(n, "")} for n in request.names]
    made: dict[str, Any] = {"method": request.method, "header": [], "url": url}
    if request.is_form:
        fields = [
            {"key": key, "type": "file", "src": value}
            if key in FILES
            else {"key": key, "type": "text", "value": value}
            for key, value in request.body.items()
        ]
        made["body"] = {"mode": "formdata", "formdata": fields}
    elif request.body is not None:
        made["header"] = [{"key": "Content-Type", "value": "application/json"}]
        made["body"] = {
            "mode": "raw",
            "raw": json.dumps(request.body, indent=2),
            "options": {"raw": {"language": "json"}},
        }
    return {"name": request.summary, "request": made, "response": []}


def http(found: list[Request]) -> str:
    """The .http file: variables first, then a block for each operation."""
    names = sorted({name for request in found for name in request.names})
    lines = [
        "# The routes of `llmkit serve`, made from its OpenAPI document.",
        "# Open it in VS Code (REST Client) or a JetBrains editor.",
        "",
        f"@base_url = {BASE_URL}",
        f"@key = {KEY}",
        *(f"@{name} = {PLACES.get(name, name)}" for name in names),
    ]
    for request in found:
        lines += ["", *_block(request)]
    return "\n".join(lines) + "\n"


def _block(request: Request) -> Iterator[str]:
    path = re.sub(r"\{(\w+)\}", r"{{\1}}", request.path)
    yield f"### {request.tag}: {request.summary}"
    yield f"{request.method} {{{{base_url}}}}{path}"
    yield "Authorization: Bearer {{key}}"
    if request.is_form:
        yield from (f"Content-Type: {FORM}; boundary=part", "")
        for key, value in request.body.items():
            name = f'filename="{value}"' if key in FILES else ""
            yield "--part"
            yield "; ".join(filter(None, [f'Content-Disposition: form-data; name="{key}"', name]))
            yield from ("", f"< ./{value}" if key in FILES else str(value))
        yield "--part--"
    elif request.body is not None:
        yield from ("Content-Type: application/json", "", json.dumps(request.body, indent=2))


def files() -> dict[Path, str]:
    """What the files should hold."""
    found = requests(asyncio.run(document()))
    return {POSTMAN: json.dumps(postman(found), indent=2) + "\n", HTTP: http(found)}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
