"""JSON schemas as they can be held: one reading of a schema, for the grammar that makes a text and for whoever reads it. Pure.

A keyword that asks nothing is left out; one that cannot be held is an error that names it and its place; one that is written in an older way is written in
today's. What a schema never ends with (an object that must hold itself) is found before anything is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from llmkit.errors import InvalidRequestError
from llmkit.fixpoint import least_fixed_point

__all__ = ["normalized"]

FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))  # that the grammar knows
TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
IN_PLACE = (
    "additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
LEAST_INTEGER, MOST_INTEGER = -9223372036854774784, 2**63 - 1
MOST_NUMBER, TINY, ENDLESS = 9.0e18, 1e-290, 1e300
LONGEST = 2**32
MAX_NODES, MAX_DEPTH = 20_000, 200
MAX_MULTIPLES = 10_000  # of all multipleOf, without their powers of ten: the grammar holds a state for each remainder
Place = tuple[Any, object]  # the place that a place is in, and its name there
ROOT: Place = (None, "#")
TYPED = {
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "propertyNames", "dependentRequired",
               "dependentSchemas", "dependencies", "unevaluatedProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
}  # fmt: skip


def normalized(schema: Any, origin: str = "json_schema", *, join_one_of: bool = False) -> Any:
    """The schema as it can be held. ``join_one_of``: cases of a oneOf may overlap.

    Raises `InvalidRequestError` that names the keyword, its place and ``origin``.

    >>> normalized({"type": "string", "format": "password"})
    {'type': 'string'}
    >>> normalized({"type": "integer", "minimum": 0, "exclusiveMinimum": True})
    {'type': 'integer', 'exclusiveMinimum': 0}
    """
    found = _Normalizer(origin, join_one_of).run(schema)
    _check_ends(found, origin)
    return found


class _Normalizer:
    def __init__(self, origin: str, join_one_of: bool) -> None:
        self._origin, self._join_one_of = origin, join_one_of
        self._num_nodes = self._multiples = 0
        self._together = 1  # the least common multiple, which cases that hold at once ask for

    def refuse(self, keyword: str, where: Place, why: str) -> InvalidRequestError:
        names: list[str] = []
        at: Any = where
        while at is not None:
            at, name = at
            names.append(f"{name!s:.80}")
        return InvalidRequestError(f"{self._origin}: {keyword} at {'/'.join(reversed(names)):.500} {why}", self._origin)

    def run(self, schema: Any) -> Any:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise InvalidRequestError(f"{self._origin}: a schema is an object, not {json.dumps(schema, default=str):.60}.", self._origin)
        return self._node(schema, ROOT, 0)

    def _node(self, node: Any, where: Place, depth: int) -> Any:
        self._num_nodes += 1
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise self.refuse("a schema", where, f"must be an object, true or false, not {json.dumps(node, default=str):.60}.")
        if self._num_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise InvalidRequestError(f"{self._origin}: the schema is too large, or nested too deeply.", self._origin)
        made: dict[str, Any] = {}
        for key, value in node.items():
            place = (where, key)
            if key in IN_MAPS and isinstance(value, dict):
                made[key] = {name: self._node(each, (place, name), depth + 1) for name, each in value.items()}
            elif (key in IN_LISTS or key == "items") and isinstance(value, list):
                made[key] = [self._node(each, (place, i), depth + 1) for i, each in enumerate(value)]
            elif key in IN_PLACE:
                made[key] = self._node(value, place, depth + 1)
            else:
                made[key] = value
        for step in (self._plain, self._values, self._numbers, self._strings, self._objects, self._arrays, self._logic, self._references):
            step(made, where)
        return made

    def _plain(self, node: dict[str, Any], where: Place) -> None:
        for key in ("$schema", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"):
            node.pop(key, None)
        kind = node.get("type")
        kinds = kind if isinstance(kind, list) else [] if kind is None else [kind]
        if not all(isinstance(k, str) and k in TYPES for k in kinds):
            raise self.refuse("type", where, f"is {json.dumps(kind, default=str):.60}; types are {', '.join(sorted(TYPES))}.")
        if kinds:  # keywords of types that cannot occur ask nothing
            for name, keywords in TYPED.items():
                if name not in kinds:
                    for key in keywords:
                        node.pop(key, None)

    def _values(self, node: dict[str, Any], where: Place) -> None:
        for key in COUNTS:
            value = node.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
                raise self.refuse(key, where, f"must be a non-negative integer, not {json.dumps(value, default=str):.60}.")
            node[key] = int(value)
            if (key.startswith("min") and value == 0 and key != "minContains") or (key.startswith("max") and value >= LONGEST):
                del node[key]

    def _numbers(self, node: dict[str, Any], where: Place) -> None:
        for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(node.get(strict), bool) and node.pop(strict) and bound in node:  # as draft 4 had it
                node[strict] = node.pop(bound)
        for key in NUMBERS:
            value = node.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.refuse(key, where, f"must be a number, not {json.dumps(value, default=str):.60}.")
        if "multipleOf" in node:
            self._count_multiple(node["multipleOf"], where)
        whole = node.get("type") == "integer"
        low, high = (LEAST_INTEGER, MOST_INTEGER) if whole else (-MOST_NUMBER, MOST_NUMBER)
        for key in ("minimum", "exclusiveMinimum"):
            value = node.get(key)
            if value is None:
                continue
            if value <= -ENDLESS or (whole and value < low):
                self._replace(node, key, "minimum", low if whole else None)
            elif value < low:
                self._replace(node, key, "minimum", low)
            elif value > high:
                raise self.refuse(key, where, f"asks for numbers larger than can be written here ({high:g}).")
            elif 0 < abs(value) < TINY:
                self._replace(node, key, "exclusiveMinimum" if value > 0 else "minimum", 0)
        for key in ("maximum", "exclusiveMaximum"):
            value = node.get(key)
            if value is None:
                continue
            if value >= ENDLESS or (whole and value > high):
                self._replace(node, key, "maximum", high if whole else None)
            elif value > high:
                self._replace(node, key, "maximum", high)
            elif value < low:
                raise self.refuse(key, where, f"asks for numbers smaller than can be written here ({low:g}).")
            elif 0 < abs(value) < TINY:
                self._replace(node, key, "exclusiveMaximum" if value < 0 else "maximum", 0)
        least, most = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum", node.get("exclusiveMaximum"))
        if least is not None and most is None and least >= 1e18:
            node["maximum"] = MOST_INTEGER if whole else MOST_NUMBER
        if most is not None and least is None and most <= -1e18:
            node["minimum"] = LEAST_INTEGER if whole else -MOST_NUMBER
        if least is not None and most is not None and least > most:
            raise self.refuse("minimum", where, f"is larger than the maximum ({least:g} > {most:g}).")

    def _count_multiple(self, value: Any, where: Place) -> None:
        if value is None or value <= 0:
            raise self.refuse("multipleOf", where, "must be more than 0.")
        factor = int("".join(map(str, Decimal(repr(value)).as_tuple().digits)).rstrip("0"))
        self._multiples += factor
        self._together = math.lcm(self._together, factor)
        if self._multiples > MAX_MULTIPLES:
            raise self.refuse("multipleOf", where, f"cannot be held: all of a schema, without their powers of ten, are at most {MAX_MULTIPLES} together.")
        if self._together > MAX_MULTIPLES:
            raise self.refuse("multipleOf", where, "cannot be held beside the others of the schema: their least common multiple is too large.")

    @staticmethod
    def _replace(node: dict[str, Any], old: str, new: str, value: Any) -> None:
        del node[old]
        if value is not None:
            node[new] = value

    def _strings(self, node: dict[str, Any], where: Place) -> None:
        form = node.get("format")
        if form is not None and form not in FORMATS:  # it describes; whoever does not know it passes over it (JSON Schema, 7.2.3)
            del node["format"]
        if "pattern" in node and not isinstance(node["pattern"], str):
            raise self.refuse("pattern", where, "must be a text.")

    def _objects(self, node: dict[str, Any], where: Place) -> None:
        properties, required = node.get("properties", {}), node.get("required", [])
        if not isinstance(properties, dict):
            raise self.refuse("properties", where, "must be an object.")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self.refuse("required", where, "must be a list of names.")
        names = node.get("propertyNames")
        if names is not None:
            if not _takes_any_text(names):
                raise self.refuse("propertyNames", where, "cannot be held; describe the names by patternProperties instead.")
            del node["propertyNames"]
        closed = node.get("additionalProperties") is False and "patternProperties" not in node
        if closed and node.get("maxProperties", -1) >= len(properties):
            del node["maxProperties"]
        if node.get("minProperties", LONGEST) <= len(set(required)):
            del node["minProperties"]
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            if key in node:
                if node[key]:
                    raise self.refuse(key, where, "cannot be held.")
                del node[key]
        rest = node.pop("unevaluatedProperties", True)
        if rest is not True and rest != {}:
            if rest is not False or any(key in node for key in ("anyOf", "oneOf", "allOf", "$ref", "if")):
                raise self.refuse("unevaluatedProperties", where, "cannot be held; use additionalProperties.")
            node.setdefault("additionalProperties", False)

    def _arrays(self, node: dict[str, Any], where: Place) -> None:
        unique = node.pop("uniqueItems", False)
        if unique and node.get("maxItems", 2) > 1:
            raise self.refuse("uniqueItems", where, "cannot be held: uniqueness cannot be enforced during generation.")
        contains = node.pop("contains", None)
        least, most = node.pop("minContains", 1), node.pop("maxContains", None)
        if contains is not None and (least > 0 or most is not None):
            raise self.refuse("contains", where, "cannot be held.")
        if node.pop("unevaluatedItems", True) not in (True, {}):
            raise self.refuse("unevaluatedItems", where, "cannot be held; use items or prefixItems.")

    def _logic(self, node: dict[str, Any], where: Place) -> None:
        if "not" in node:
            if node["not"] is not False:
                raise self.refuse("not", where, "cannot be held.")
            del node["not"]
        if "if" in node and ("then" in node or "else" in node):
            raise self.refuse("if", where, "cannot be held.")
        for key in ("if", "then", "else"):
            node.pop(key, None)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in node and (not isinstance(node[key], list) or not node[key]):
                raise self.refuse(key, where, "must be a list of schemas.")
        if self._join_one_of and "oneOf" in node and "anyOf" not in node:
            node["anyOf"] = node.pop("oneOf")

    def _references(self, node: dict[str, Any], where: Place) -> None:
        if node.get("$recursiveRef") == "#":
            node["$ref"] = node.pop("$recursiveRef")
        for key in ("$dynamicRef", "$recursiveRef"):
            if key in node:
                raise self.refuse(key, where, "cannot be followed; use $ref.")
        target = node.get("$ref")
        if target is not None and not isinstance(target, str):
            raise self.refuse("$ref", where, "must be a text.")
        if isinstance(target, str) and ("://" in target or target.startswith(("file:", "/", ".."))):
            raise self.refuse("$ref", where, "refers to what is elsewhere; put it into $defs.")


def _takes_any_text(schema: Any) -> bool:
    """Whether a schema lets every text through."""
    if isinstance(schema, bool):
        return schema
    kind = schema.get("type", "string")
    binding = schema.keys() - {"type", "title", "description", "$comment", "examples", "default", "format"}
    return not binding and ("string" in kind if isinstance(kind, list) else kind == "string")


# -- whether it ever ends


def _check_ends(schema: Any, origin: str) -> None:
    """Raises `InvalidRequestError` for a schema without a finite text; cases that never end are taken out of it."""
    tree = _Tree(schema)
    ending = least_fixed_point(tree.needs())
    if 0 not in ending:
        raise InvalidRequestError(f"{origin}: the schema has no finite text: it requires itself, endlessly.", origin)
    tree.prune(ending)


class _Tree:
    """A schema's schemas by number, each with those within it: (keyword, name or place) -> number."""

    def __init__(self, schema: Any) -> None:
        self._nodes: list[Any] = []
        self._within: list[dict[tuple[str, object], int]] = []
        self._number: dict[int, int] = {}  # by identity; true and false have none
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
        """What each needs to have a finite text; of one that is an object or an array, either."""
        found: dict[Hashable, Iterator[Sequence[Hashable]]] = {}
        for number, node in enumerate(self._nodes):
            found[number] = self._needs(number, node)
            if isinstance(node, dict):
                found[number, "object"], found[number, "array"] = self._of_object(number, node), self._of_array(number, node)
        return found

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
        key, rest = ("items", "additionalItems") if isinstance(node.get("items"), list) else ("prefixItems", "items")
        for i in range(min(node.get("minItems", 0), MAX_NODES)):
            if (key, i) in within and isinstance(node.get(key), list):
                yield (within[key, i],)
            else:
                if (rest, 0) in within:
                    yield (within[rest, 0],)
                return  # all the others are like this one

    def _find(self, pointer: str) -> Any:
        """What a reference refers to, or None."""
        at = self._nodes[0]
        for part in unquote(pointer).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict):
                at = at.get(name)
            elif isinstance(at, list) and name.isascii() and name.isdigit() and len(name) < 9 and int(name) < len(at):
                at = at[int(name)]
            else:
                return None
        return at if pointer.startswith("#") else None

    def prune(self, ending: set[Hashable]) -> None:
        """What never ends cannot be begun."""
        for number, node in enumerate(self._nodes):
            if not isinstance(node, dict):
                continue
            within = self._within[number]
            for key in ("anyOf", "oneOf"):
                if key in node:
                    node[key] = [case for i, case in enumerate(node[key]) if within[key, i] in ending] or node[key]
            for name in node.get("properties", {}):
                if within["properties", name] not in ending:
                    node["properties"][name] = False
            for key in ("items", "additionalProperties"):
                if isinstance(node.get(key), dict) and within[key, 0] not in ending:
                    node[key] = False


def _children(node: dict[str, Any]) -> Iterator[tuple[tuple[str, object], Any]]:
    for key, value in node.items():
        if key in IN_MAPS and isinstance(value, dict):
            yield from (((key, name), child) for name, child in value.items())
        elif (key in IN_LISTS or key == "items") and isinstance(value, list):
            yield from (((key, i), child) for i, child in enumerate(value))
        elif key in IN_PLACE:
            yield (key, 0), value
