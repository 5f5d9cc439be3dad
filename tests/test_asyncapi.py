"""The description of the chat socket says what the messages are: every field, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llmkit.gateway.sockets.handler import PATHS
from llmkit.gateway.sockets.messages import CLIENT_MESSAGES, SERVER_MESSAGES, Fault
from llmkit.settings.gateway import GatewayOptions

FILE = Path(__file__).parents[1] / "docs/reference/asyncapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
MESSAGES = (*CLIENT_MESSAGES, *SERVER_MESSAGES)


def plain(schema: Any) -> Any:
    """A schema without what is only for people, in one spelling."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return {"const": schema["const"] if "const" in schema else schema["enum"][0]}
    found = {"default": schema["default"]} if schema.get("default") is not None else {}
    kinds = schema.get("anyOf") or (
        [{"type": kind} for kind in schema["type"]]
        if isinstance(schema["type"], list)
        else [schema]
    )
    each = [(k["type"], k["items"]["type"] if k["type"] == "array" else "") for k in kinds]
    return {**found, "kinds": sorted(each)}


@pytest.mark.parametrize("message", [*MESSAGES, Fault], ids=lambda m: m.__name__)
def test_every_field_of_a_message_is_described(message: type[msgspec.Struct]) -> None:
    _, found = msgspec.json.schema_components([message])
    made, written = found[message.__name__], SCHEMAS[message.__name__]
    assert set(written["properties"]) == set(made["properties"])
    assert set(written["required"]) == set(made["required"])
    assert written.get("additionalProperties") == made.get("additionalProperties")
    for name, schema in made["properties"].items():
        field = written["properties"][name]
        assert plain(field) == plain(schema), name
        assert "const" in field or "$ref" in field or field["description"].strip(), name


def test_every_message_is_described_and_no_other() -> None:
    assert list(SCHEMAS) == [m.__name__ for m in (*MESSAGES, Fault)]
    components = DOCUMENT["components"]["messages"]
    tags = {m.__name__: m.__struct_config__.tag for m in MESSAGES}
    assert {name: m["name"] for name, m in components.items()} == tags
    assert all(m["summary"].strip() for m in components.values())
    for operation, messages in (("fromClient", CLIENT_MESSAGES), ("fromServer", SERVER_MESSAGES)):
        named = [m["$ref"] for m in DOCUMENT["operations"][operation]["messages"]]
        assert named == [f"#/channels/chat/messages/{m.__name__}" for m in messages]


def test_its_references_lead_somewhere_and_it_names_every_address() -> None:
    def refs(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [v for k, v in node.items() if k == "$ref"] + [
                r for v in node.values() for r in refs(v)
            ]
        return [r for v in node for r in refs(v)] if isinstance(node, list) else []

    for ref in refs(DOCUMENT):
        node: Any = DOCUMENT
        for part in ref.removeprefix("#/").split("/"):
            node = node[part]
    channel = DOCUMENT["channels"]["chat"]
    said = channel["address"] + channel["description"]
    assert all(f"/{path}" in said for path in PATHS.removesuffix("/?").strip("()").split("|"))
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT["servers"]["alone"]["host"] == f"127.0.0.1:{GatewayOptions().port}"
