"""The subschemas of a JSON schema: where they are, and which of them have a finite text.

Pure. Knows where keywords hold schemas, but not what the other keywords mean or which are
supported: `llmkit.protocol.schema` validates them first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from llmkit.errors import InvalidRequestError
from llmkit.protocol.fixpoint import least_fixed_point

__all__ = ["IN_LISTS", "IN_MAPS", "IN_PLACE", "MAX_NODES", "check_finite"]

# Keywords that hold schemas: by name, in a list, or as their value.
IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
IN_PLACE = (
    "additionalProperties",
    "additionalItems",
    "items",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
MAX_NODES = 20_000


def check_finite(schema: Any, origin: str) -> None:
    """Remove cases that never end from the schema.

    Raises `InvalidRequestError` for a schema without a finite text.
    """
    tree = _Tree(schema)
    finite = least_fixed_point(tree.needs())
    if 0 not in finite:
        raise InvalidRequestError(
            f"{origin}: the schema has no finite text: it requires itself endlessly.", origin
        )
    tree.prune(finite)


class _Tree:
    """A schema's subschemas by number, each with its children.

    Children are found by keyword and name or index: (keyword, name or index) -> number.
    """

    def __init__(self, schema: Any) -> None:
        self._nodes: list[Any] = []
        self._within: list[dict[tuple[str, object], int]] = []
        self._number: dict[int, int] = {}  # by identity; true and false have no number
        left: list[tuple[Any, int, tuple[str, object]]] = [(schema, -1, ("", 0))]
        while left:
            node, parent, place = left.pop()
            number = len(self._nodes)
            self._nodes.append(node)
            self._within.append({})
            if parent >= 0:
                self._within[parent][place] = number
            if isinstance(node, dict):
                self._number[id(node)] = number
                left += [(child, number, where) for where, child in _children(node)]

    def needs(self) -> dict[Hashable, Iterator[Sequence[Hashable]]]:
        """What each needs to have a finite text; what may be an object or array, either of them."""
        needs: dict[Hashable, Iterator[Sequence[Hashable]]] = {}
        for number, node in enumerate(self._nodes):
            needs[number] = self._needs(number, node)
            if isinstance(node, dict):
                needs[number, "object"] = self._of_object(number, node)
                needs[number, "array"] = self._of_array(number, node)
        return needs

    def _needs(self, number: int, node: Any) -> Iterator[Sequence[Hashable]]:
        if isinstance(node, bool):
            if not node:
                yield ()
            return
        within = self._within[number]
        if isinstance(node.get("$ref"), str):
            target = self._find(node["$ref"])
            if target is False:
                yield ()
            elif id(target) in self._number:
                yield (self._number[id(target)],)
        for i in range(len(node.get("allOf", ()))):
            yield (within["allOf", i],)
        for key in ("anyOf", "oneOf"):
            if key in node:
                yield [within[key, i] for i in range(len(node[key]))]
        if "const" in node or "enum" in node:
            if not node.get("enum", True):
                yield ()
            return
        kind = node.get("type")
        kinds = kind if isinstance(kind, list) else [kind]
        if all(k in ("object", "array") for k in kinds):
            yield [(number, k) for k in kinds]

    def _of_object(self, number: int, node: dict[str, Any]) -> Iterator[Sequence[Hashable]]:
        within, properties = self._within[number], node.get("properties", {})
        for name in node.get("required", ()):
            if name in properties:
                yield (within["properties", name],)
            elif "patternProperties" not in node and ("additionalProperties", 0) in within:
                yield (within["additionalProperties", 0],)

    def _of_array(self, number: int, node: dict[str, Any]) -> Iterator[Sequence[Hashable]]:
        within = self._within[number]
        key, rest = (
            ("items", "additionalItems")
            if isinstance(node.get("items"), list)
            else ("prefixItems", "items")
        )
        for i in range(min(node.get("minItems", 0), MAX_NODES)):
            if (key, i) in within and isinstance(node.get(key), list):
                yield (within[key, i],)
            else:
                if (rest, 0) in within:
                    yield (within[rest, 0],)
                return  # all further items are like this one

    def _find(self, pointer: str) -> Any:
        """The target of a reference, or None."""
        at = self._nodes[0]
        for part in unquote(pointer).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict):
                at = at.get(name)
            elif (
                isinstance(at, list)
                and name.isascii()
                and name.isdigit()
                and len(name) < 9
                and int(name) < len(at)
            ):
                at = at[int(name)]
            else:
                return None
        return at if pointer.startswith("#") else None

    def prune(self, finite: set[Hashable]) -> None:
        """Remove what never ends, so that it cannot be begun."""
        for number, node in enumerate(self._nodes):
            if not isinstance(node, dict):
                continue
            within = self._within[number]
            for key in ("anyOf", "oneOf"):
                if key in node:
                    node[key] = [
                        case for i, case in enumerate(node[key]) if within[key, i] in finite
                    ] or node[key]
            for name in node.get("properties", {}):
                if within["properties", name] not in finite:
                    node["properties"][name] = False
            for key in ("items", "additionalProperties"):
                if isinstance(node.get(key), dict) and within[key, 0] not in finite:
                    node[key] = False


def _children(node: dict[str, Any]) -> Iterator[tuple[tuple[str, object], Any]]:
    """The schemas directly within one, by keyword and name or index."""
    for key, value in node.items():
        if key in IN_MAPS and isinstance(value, dict):
            yield from (((key, name), child) for name, child in value.items())
        elif (key in IN_LISTS or key == "items") and isinstance(value, list):
            yield from (((key, i), child) for i, child in enumerate(value))
        elif key in IN_PLACE:
            yield (key, 0), value
