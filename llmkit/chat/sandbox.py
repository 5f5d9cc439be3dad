"""Where chat templates run: transformers' jinja2 environment, with allow-lists and a budget.

Pure; any thread. Anybody can make a file with a chat template in it. jinja2's immutable sandbox
keeps templates away from Python's objects, but bounds neither time nor memory. Here only the
filters, tests, methods and globals that real templates use exist; every loop iteration, call,
filter, test, comparison, slice and piece of output costs steps by the size of what it handles; and
no string, list or number grows beyond a limit.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmkit.chat.bounds import current_budget, refuse
from llmkit.chat.filters import OWN_FILTERS

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["RESERVED_NAMES", "make_environment"]

RESERVED_NAMES = ("__step__", "__concat__", "__made__", "__charged__", "__turn__")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words("""
    abs capitalize count d default dictsort e escape first float indent int items join last length
    list lower map max min reject rejectattr replace reverse round safe select selectattr sort
    string sum title trim unique upper wordcount""")
TESTS = _words("""
    boolean defined divisibleby eq equalto even false filter float ge gt in integer iterable le
    lower lt mapping ne none number odd sameas sequence string test true undefined upper
    == != > >= < <=""")
QUICK_FILTERS = _words("abs count d default first float int last length round safe")
# Cost factors of filters that compare entries with each other or read each character.
DEARER = {
    "sort": 18,
    "unique": 2,
    "min": 2,
    "max": 2,
    "dictsort": 18,
    "title": 16,
    "wordcount": 16,
    "capitalize": 2,
    "e": 4,
    "escape": 4,
}
SLOW_TESTS = _words("eq equalto ge gt in le lower lt ne upper == != > >= < <=")
METHODS: dict[type, frozenset[str]] = {
    str: _words("""
        capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal
        isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
        removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith
        strip swapcase title upper"""),
    list: _words("copy count index"),
    tuple: _words("count index"),
    dict: _words("copy get items keys values"),
}
LOOP = _words(
    "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
)
MAX_SOURCE, MAX_NESTED, MAX_EXPRESSION = 1 << 20, 18, 400


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that compiles chat templates: transformers', with bounds."""
    from jinja2 import nodes, pass_context
    from jinja2.ext import Extension
    from jinja2.runtime import LoopContext, Macro, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """``{% generation %}`` marks text for training and prints nothing itself."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own style

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Meter(NodeTransformer):
        """Inserts the charges into a template's syntax tree."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, _statement("__step__", node))
            if node.test is not None:  # which may skip every iteration
                node.test = nodes.And(_call("__turn__", [], node), node.test, lineno=node.lineno)
            return node

        def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, _statement("__step__", node))
            return node

        visit_CallBlock = visit_Macro

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return _call("__concat__", node.nodes, node)

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            node.expr = _call("__charged__", [node.expr], node)
            for operand in node.ops:
                operand.expr = _call("__charged__", [operand.expr], node)
            return node

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = _call("__charged__", [node.node], node)
            return node

        def _visit_literal(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            return (
                _call("__made__", [node], node) if getattr(node, "ctx", "load") == "load" else node
            )

        visit_List = visit_Dict = visit_Tuple = _visit_literal

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            if len(source) > MAX_SOURCE:
                refuse("the template is too long")
            if any(reserved in source for reserved in RESERVED_NAMES):
                refuse("the template uses a reserved name")
            tree: nodes.Template = super()._parse(source, name, filename)
            _check_depth(tree)
            Meter().visit(tree)
            return tree

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            for kind, allowed in METHODS.items():
                if isinstance(obj, kind):
                    return attr in allowed
            if isinstance(obj, LoopContext):
                return attr in LOOP
            if isinstance(obj, Macro):
                return attr in ("name", "arguments", "catch_kwargs", "catch_varargs", "caller")
            return isinstance(obj, Namespace | Undefined) and super().is_safe_attribute(
                obj, attr, value
            )

        def wrap_str_format(self, value: Any) -> Any:
            """Disabled: it checks values only once formatted, `Budget.check_call` before."""
            return None

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget = current_budget()
            budget.check_call(obj, args, kwargs)
            return budget.made(super().call(context, obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget = current_budget()
            budget.check_operation(operator, left, right)
            return budget.made(super().call_binop(context, operator, left, right))

    def charged_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter charged by the size of its input and output; nothing is left lazy."""
        kind = getattr(run, "jinja_pass_arg", None)

        @pass_context
        def filtered(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = current_budget()
            value = budget.listed(value)
            budget.step()
            if name not in QUICK_FILTERS:
                budget.charge_whole(*args)
                budget.charge_often(DEARER.get(name, 1), value)
            passed = {
                "context": context,
                "eval_context": context.eval_ctx,
                "environment": context.environment,
            }
            first = (passed[kind.name],) if kind is not None else ()
            return budget.made(budget.listed(run(*first, value, *args, **kwargs)))

        return filtered

    def charged_test(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        kind = getattr(run, "jinja_pass_arg", None)

        @pass_context
        def tested(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            current_budget().step()
            if name in SLOW_TESTS:
                current_budget().charge_whole(value, *args)
            passed = {
                "context": context,
                "eval_context": context.eval_ctx,
                "environment": context.environment,
            }
            return run(*((passed[kind.name],) if kind is not None else ()), value, *args, **kwargs)

        return tested

    @pass_context
    def shown(_: Any, value: Any) -> Any:
        return current_budget().text(value)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
        optimized=False,
        finalize=shown,
        cache_size=0,
    )
    environment.filters = {
        name: charged_filter(name, run)
        for name, run in {**environment.filters, **OWN_FILTERS}.items()
        if name in FILTERS or name in OWN_FILTERS
    }
    tests: dict[str, Any] = {**environment.tests}
    environment.tests = {
        name: charged_test(name, run) for name, run in tests.items() if name in TESTS
    }
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": Namespace,
        "raise_exception": refuse,
        "strftime_now": lambda layout: datetime.datetime.now().strftime(str(layout)[:200]),
        "__step__": _step,
        "__turn__": _turn,
        "__concat__": lambda *values: "".join(current_budget().texts(values)),
        "__made__": lambda value: current_budget().made(value),
        "__charged__": _charged,
    }
    environment.policies = {**environment.policies, "json.dumps_function": json.dumps}
    return environment


def _step() -> str:
    current_budget().step()
    return ""


def _turn() -> bool:
    current_budget().step()
    return True


def _charged(value: Any) -> Any:
    current_budget().charge_whole(value)
    return value


def _call(name: str, args: list[Any], at: nodes.Node) -> nodes.Call:
    from jinja2 import nodes

    return nodes.Call(
        nodes.Name(name, "load", lineno=at.lineno), args, [], None, None, lineno=at.lineno
    )


def _statement(name: str, at: nodes.Node) -> nodes.Output:
    from jinja2 import nodes

    return nodes.Output([_call(name, [], at)], lineno=at.lineno)


def _check_depth(tree: nodes.Template) -> None:
    """Refuse deep nesting: Python compiles at most 20 nested blocks; deep expressions crash it."""
    from jinja2 import nodes

    level: list[tuple[Any, int, int]] = [(tree, 0, 0)]
    while level:
        node, blocks, depth = level.pop()
        blocks += isinstance(
            node,
            nodes.For | nodes.If | nodes.Macro | nodes.CallBlock | nodes.FilterBlock | nodes.With,
        )
        depth += 1
        if blocks > MAX_NESTED or depth > MAX_EXPRESSION:
            refuse("the template is nested too deeply")
        level += [(child, blocks, depth) for child in node.iter_child_nodes()]
