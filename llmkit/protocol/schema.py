"""JSON schemas, normalized: one reading for the grammar that generates and for whoever reads.

Pure. Keywords without effect are dropped, unsupported ones are errors that name the keyword and
its place, and outdated spellings become today's. A schema that never ends (an object that must
contain itself) is found before anything is computed, see `llmkit.protocol.subschemas`.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.protocol.subschemas import IN_LISTS, IN_MAPS, IN_PLACE, MAX_NODES, check_finite

__all__ = ["normalized"]

# Formats that the grammar supports.
FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
COUNTS = (
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
LEAST_INTEGER, MOST_INTEGER = -9223372036854774784, 2**63 - 1
MOST_NUMBER, TINY, ENDLESS = 9.0e18, 1e-290, 1e300
LONGEST = 2**32
MAX_DEPTH = 200
# Sum of all multipleOf, powers of ten removed: the grammar keeps a state per remainder.
MAX_MULTIPLES = 10_000
Place = tuple[Any, object]  # the enclosing place, and the name within it
ROOT: Place = (None, "#")
TYPED = {
    "object": (
        "properties",
        "patternProperties",
        "additionalProperties",
        "required",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
    ),
    "array": (
        "items",
        "prefixItems",
        "additionalItems",
        "minItems",
        "maxItems",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "unevaluatedItems",
    ),
}


MAY_BE_NULL = ("const", "default", "example", "examples")


def normalized(schema: Any, origin: str = "json_schema", *, join_one_of: bool = False) -> Any:
    """The schema in a form that can be enforced. ``join_one_of``: oneOf cases may overlap.

    Raises `InvalidRequestError` naming the keyword, its place and ``origin``.

    >>> normalized({"type": "string", "format": "password"})
    {'type': 'string'}
    >>> normalized({"type": "integer", "minimum": 0, "exclusiveMinimum": True})
    {'type': 'integer', 'exclusiveMinimum': 0}
    """
    enforceable = _Normalizer(origin, join_one_of).run(schema)
    check_finite(enforceable, origin)
    return enforceable


class _Normalizer:
    def __init__(self, origin: str, join_one_of: bool) -> None:
        self._origin, self._join_one_of = origin, join_one_of
        self._num_nodes = self._multiples = 0
        self._together = 1  # least common multiple: several multipleOf may apply at once

    def refuse(self, keyword: str, where: Place, why: str) -> InvalidRequestError:
        names: list[str] = []
        at: Any = where
        while at is not None:
            at, name = at
            names.append(f"{name!s:.80}")
        place = "/".join(reversed(names))
        return InvalidRequestError(f"{self._origin}: {keyword} at {place:.500} {why}", self._origin)

    def run(self, schema: Any) -> Any:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise InvalidRequestError(
                f"{self._origin}: a schema is an object, not "
                f"{json.dumps(schema, default=str):.60}.",
                self._origin,
            )
        return self._node(schema, ROOT, 0)

    def _node(self, node: Any, where: Place, depth: int) -> Any:
        self._num_nodes += 1
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise self.refuse(
                "a schema",
                where,
                f"must be an object, true or false, not {json.dumps(node, default=str):.60}.",
            )
        if self._num_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise InvalidRequestError(
                f"{self._origin}: the schema is too large or nested too deeply.", self._origin
            )
        made: dict[str, Any] = {}
        for key, value in node.items():
            place = (where, key)
            if value is None and key not in MAY_BE_NULL:
                continue  # serializers write null for a keyword that is not there
            if key in IN_MAPS and not isinstance(value, dict):
                raise self.refuse(key, where, "must be an object.")
            if key in (*IN_LISTS, "enum") and not isinstance(value, list):
                raise self.refuse(key, where, "must be a list.")
            if key in IN_MAPS:
                made[key] = {
                    name: self._node(each, (place, name), depth + 1) for name, each in value.items()
                }
            elif (key in IN_LISTS or key == "items") and isinstance(value, list):
                made[key] = [
                    self._node(each, (place, i), depth + 1) for i, each in enumerate(value)
                ]
            elif key in IN_PLACE:
                made[key] = self._node(value, place, depth + 1)
            else:
                made[key] = value
        for step in (
            self._plain,
            self._values,
            self._numbers,
            self._strings,
            self._objects,
            self._arrays,
            self._logic,
            self._references,
        ):
            step(made, where)
        return made

    def _plain(self, node: dict[str, Any], where: Place) -> None:
        for key in ("$schema", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"):
            node.pop(key, None)
        kind = node.get("type")
        kinds = kind if isinstance(kind, list) else [] if kind is None else [kind]
        if not all(isinstance(k, str) and k in TYPES for k in kinds):
            raise self.refuse(
                "type",
                where,
                f"is {json.dumps(kind, default=str):.60}; types are {', '.join(sorted(TYPES))}.",
            )
        if kinds:  # keywords of types that cannot occur have no effect
            for name, keywords in TYPED.items():
                if name not in kinds:
                    for key in keywords:
                        node.pop(key, None)

    def _values(self, node: dict[str, Any], where: Place) -> None:
        for key in COUNTS:
            value = node.get(key)
            if key not in node:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or value != int(value)
                or value < 0
            ):
                raise self.refuse(
                    key,
                    where,
                    f"must be a non-negative integer, not {json.dumps(value, default=str):.60}.",
                )
            node[key] = int(value)
            if (key.startswith("min") and value == 0 and key != "minContains") or (
                key.startswith("max") and value >= LONGEST
            ):
                del node[key]

    def _numbers(self, node: dict[str, Any], where: Place) -> None:
        for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            # Draft 4 spells exclusive bounds as booleans.
            if isinstance(node.get(strict), bool) and node.pop(strict) and bound in node:
                node[strict] = node.pop(bound)
        for key in NUMBERS:
            value = node.get(key)
            if value is None:
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise self.refuse(
                    key, where, f"must be a number, not {json.dumps(value, default=str):.60}."
                )
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
                raise self.refuse(key, where, f"exceeds the largest supported number ({high:g}).")
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
                raise self.refuse(key, where, f"is below the smallest supported number ({low:g}).")
            elif 0 < abs(value) < TINY:
                self._replace(node, key, "exclusiveMaximum" if value < 0 else "maximum", 0)
        least = node.get("minimum", node.get("exclusiveMinimum"))
        most = node.get("maximum", node.get("exclusiveMaximum"))
        if least is not None and most is None and least >= 1e18:
            node["maximum"] = MOST_INTEGER if whole else MOST_NUMBER
        if most is not None and least is None and most <= -1e18:
            node["minimum"] = LEAST_INTEGER if whole else -MOST_NUMBER
        if least is not None and most is not None and least > most:
            raise self.refuse("minimum", where, f"exceeds the maximum ({least:g} > {most:g}).")

    def _count_multiple(self, value: Any, where: Place) -> None:
        if value <= 0:
            raise self.refuse("multipleOf", where, "must be greater than 0.")
        factor = int("".join(map(str, Decimal(repr(value)).as_tuple().digits)).rstrip("0"))
        self._multiples += factor
        self._together = math.lcm(self._together, factor)
        if self._multiples > MAX_MULTIPLES:
            raise self.refuse(
                "multipleOf",
                where,
                "is too large: a schema's multipleOf values, powers of ten removed, may add up to "
                f"at most {MAX_MULTIPLES}.",
            )
        if self._together > MAX_MULTIPLES:
            raise self.refuse(
                "multipleOf",
                where,
                "cannot be combined with the schema's others: their least common multiple is too "
                "large.",
            )

    @staticmethod
    def _replace(node: dict[str, Any], old: str, new: str, value: Any) -> None:
        del node[old]
        if value is not None:
            node[new] = value

    def _strings(self, node: dict[str, Any], where: Place) -> None:
        form = node.get("format")
        # An unknown format is an annotation, to be ignored (JSON Schema, 7.2.3).
        if form is not None and form not in FORMATS:
            del node["format"]
        if "pattern" in node and not isinstance(node["pattern"], str):
            raise self.refuse("pattern", where, "must be a string.")

    def _objects(self, node: dict[str, Any], where: Place) -> None:
        properties, required = node.get("properties", {}), node.get("required", [])
        if not isinstance(properties, dict):
            raise self.refuse("properties", where, "must be an object.")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self.refuse("required", where, "must be a list of names.")
        names = node.get("propertyNames")
        if names is not None:
            if not _takes_any_text(names):
                raise self.refuse(
                    "propertyNames",
                    where,
                    "is not supported; describe the names with patternProperties instead.",
                )
            del node["propertyNames"]
        closed = node.get("additionalProperties") is False and "patternProperties" not in node
        if closed and node.get("maxProperties", -1) >= len(properties):
            del node["maxProperties"]
        if node.get("minProperties", LONGEST) <= len(set(required)):
            del node["minProperties"]
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            if key in node:
                if node[key]:
                    raise self.refuse(key, where, "is not supported.")
                del node[key]
        rest = node.pop("unevaluatedProperties", True)
        if rest is not True and rest != {}:
            if rest is not False or any(
                key in node for key in ("anyOf", "oneOf", "allOf", "$ref", "if")
            ):
                raise self.refuse(
                    "unevaluatedProperties", where, "is not supported; use additionalProperties."
                )
            node.setdefault("additionalProperties", False)

    def _arrays(self, node: dict[str, Any], where: Place) -> None:
        unique = node.pop("uniqueItems", False)
        if unique and node.get("maxItems", 2) > 1:
            raise self.refuse(
                "uniqueItems",
                where,
                "is not supported: uniqueness cannot be enforced during generation.",
            )
        contains = node.pop("contains", None)
        least, most = node.pop("minContains", 1), node.pop("maxContains", None)
        if contains is not None and (least > 0 or most is not None):
            raise self.refuse("contains", where, "is not supported.")
        if node.pop("unevaluatedItems", True) not in (True, {}):
            raise self.refuse(
                "unevaluatedItems", where, "is not supported; use items or prefixItems."
            )

    def _logic(self, node: dict[str, Any], where: Place) -> None:
        if "not" in node:
            if node["not"] is not False:
                raise self.refuse("not", where, "is not supported.")
            del node["not"]
        if "if" in node and ("then" in node or "else" in node):
            raise self.refuse("if", where, "is not supported.")
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
                raise self.refuse(key, where, "is not supported; use $ref.")
        target = node.get("$ref")
        if target is not None and not isinstance(target, str):
            raise self.refuse("$ref", where, "must be a string.")
        if isinstance(target, str) and ("://" in target or target.startswith(("file:", "/", ".."))):
            raise self.refuse(
                "$ref", where, "points outside the schema; put its target into $defs."
            )


def _takes_any_text(schema: Any) -> bool:
    """Whether a schema accepts every string."""
    if isinstance(schema, bool):
        return schema
    kind = schema.get("type", "string")
    binding = schema.keys() - {
        "type",
        "title",
        "description",
        "$comment",
        "examples",
        "default",
        "format",
    }
    return not binding and ("string" in kind if isinstance(kind, list) else kind == "string")
