"""jinja2's immutable sandbox, with bounds: a chat template comes from a file that anybody may have made, and the sandbox alone bounds neither time nor memory.

Every turn of a loop and every call of a macro costs one step of a budget, and no operation may build a text or number beyond a size.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["BUDGET", "MAX_OUTPUT", "Budget", "make_environment"]

BUDGET = "__budget__"
MAX_STEPS = 200_000
MAX_OUTPUT = 16 << 20
MAX_NUMBER_BITS = 4096


class Budget:
    """The steps one rendering may still take."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def step(self) -> str:
        self._left -= 1
        if self._left < 0:
            refuse("the template takes too many steps")
        return ""


def refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def bounded(text: Any) -> Any:
    """The result of a concatenation, if it is not too long."""
    if len(text) > MAX_OUTPUT:
        refuse("the template builds too long a text")
    return text


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are compiled in."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Bounds(NodeTransformer):
        """Puts the checks into a template's syntax tree."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, step(node))
            return node

        def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, step(node))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            name = nodes.Name("__bounded__", "load", lineno=node.lineno)
            return nodes.Call(name, [node], [], None, None, lineno=node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            if BUDGET in source or "__bounded__" in source:
                refuse("the template uses a reserved name")
            tree: nodes.Template = super()._parse(source, name, filename)
            Bounds().visit(tree)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent"):  # padding without bounds; no chat template needs the first two
        environment.filters.pop(name)
    environment.filters["indent"] = lambda text, width=4, first=False, blank=False: indent(str(text), width, first)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=min(indent, 16) if indent else None)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(str(layout)[:200])
    environment.globals["__bounded__"] = bounded
    return environment


def step(node: nodes.Node) -> nodes.Output:
    """A statement that takes one step of the budget."""
    from jinja2 import nodes

    line = node.lineno
    method = nodes.Getattr(nodes.Name(BUDGET, "load", lineno=line), "step", "load", lineno=line)
    return nodes.Output([nodes.Call(method, [], [], None, None, lineno=line)], lineno=line)


def indent(text: str, width: Any, first: bool) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = bounded(text).splitlines(keepends=True)
    return "".join((pad if i or first else "") + line for i, line in enumerate(lines))


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be out of bounds, before it is computed."""
    sized = [v for v in (left, right) if isinstance(v, str | list | tuple)]
    numbers = [v for v in (left, right) if isinstance(v, int)]
    if operator == "%" and isinstance(left, str):
        refuse("the template formats with %; use ~ instead")
    if operator == "+" and sum(len(v) for v in sized) > MAX_OUTPUT:
        refuse("the template builds too long a text")
    if operator == "*" and sized and numbers and len(sized[0]) * numbers[0] > MAX_OUTPUT:
        refuse("the template builds too long a text")
    if operator in ("*", "**") and len(numbers) == 2:
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_NUMBER_BITS:
            refuse("the template builds too large a number")
