"""Where chat templates run: transformers' environment, with an allow-list and a budget. Pure; any thread.

A chat template comes from a file that anybody may have made. jinja2's immutable sandbox keeps it from Python's objects, but bounds neither time nor memory.
Here only the filters, tests, methods and globals that real templates use are there; every loop turn, call, filter, test, comparison, slice and piece of output
costs steps by the size of what it handles; and no text, list or number grows beyond a size.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from llmkit.chat.bounds import MAX_ITEMS, Budget, refuse

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["RESERVED_NAMES", "make_environment", "metered"]

RESERVED_NAMES = ("__step__", "__concat__", "__made__", "__charged__", "__turn__")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words("""
    abs capitalize count d default dictsort e escape first float indent int items join last length list lower map max min reject rejectattr replace reverse
    round safe select selectattr sort string sum title trim unique upper wordcount""")
TESTS = _words("""
    boolean defined divisibleby eq equalto even false filter float ge gt in integer iterable le lower lt mapping ne none number odd sameas sequence string test
    true undefined upper == != > >= < <=""")
QUICK_FILTERS = _words("abs count d default first float int last length round safe")
# What is compared with each other, or read character by character, costs more.
DEARER = {"sort": 18, "unique": 2, "min": 2, "max": 2, "dictsort": 18, "title": 16, "wordcount": 16, "capitalize": 2, "e": 4, "escape": 4}
MAX_PRECISION, MAX_NUMERAL, MAX_PAD = 20, 1000, 16
SLOW_TESTS = _words("eq equalto ge gt in le lower lt ne upper == != > >= < <=")
METHODS: dict[type, frozenset[str]] = {
    str: _words("""
        capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle isupper join lower
        lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"""),
    list: _words("copy count index"),
    tuple: _words("count index"),
    dict: _words("copy get items keys values"),
}
LOOP = _words("changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0")
MAX_SOURCE, MAX_NESTED, MAX_EXPRESSION = 1 << 20, 18, 400
_bill: ContextVar[Budget] = ContextVar("llmkit_template_budget")


@contextmanager
def metered(budget: Budget | None = None) -> Iterator[None]:
    """Within, templates run on this budget, or one of their own."""
    budget = budget or Budget()
    token = _bill.set(budget)
    try:
        with budget.running():
            yield
    finally:
        _bill.reset(token)


def _budget() -> Budget:
    try:
        return _bill.get()
    except LookupError:  # while a template is compiled
        return Budget()


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are compiled in: transformers', with bounds."""
    from jinja2 import nodes, pass_context
    from jinja2.ext import Extension
    from jinja2.runtime import LoopContext, Macro, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """``{% generation %}`` marks text for training, and shows nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Meter(NodeTransformer):
        """Puts the bill into a template's syntax tree."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, _statement("__step__", node))
            if node.test is not None:  # which may leave out every turn
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
            return _call("__made__", [node], node) if getattr(node, "ctx", "load") == "load" else node

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
            return isinstance(obj, Namespace | Undefined) and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            """Its own way to format checks what is filled in only after it was made; ours is checked before, see `Budget.check_call`."""
            return None

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget = _budget()
            budget.check_call(obj, args, kwargs)
            return budget.made(super().call(context, obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget = _budget()
            budget.check_operation(operator, left, right)
            return budget.made(super().call_binop(context, operator, left, right))

    def charged_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter charged by the size of its input and output; nothing is computed later."""
        kind = getattr(run, "jinja_pass_arg", None)

        @pass_context
        def filtered(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = _budget()
            value = budget.listed(value)
            budget.step()
            if name not in QUICK_FILTERS:
                budget.charge_whole(*args)
                budget.charge_often(DEARER.get(name, 1), value)
            passed = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
            first = (passed[kind.name],) if kind is not None else ()
            return budget.made(budget.listed(run(*first, value, *args, **kwargs)))

        return filtered

    def charged_test(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        kind = getattr(run, "jinja_pass_arg", None)

        @pass_context
        def tested(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            _budget().step()
            if name in SLOW_TESTS:
                _budget().charge_whole(value, *args)
            passed = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
            return run(*((passed[kind.name],) if kind is not None else ()), value, *args, **kwargs)

        return tested

    @pass_context
    def shown(_: Any, value: Any) -> Any:
        return _budget().text(value)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation], optimized=False, finalize=shown, cache_size=0
    )
    own = {
        "indent": _indent,
        "tojson": _tojson,
        "join": _join,
        "replace": _replace,
        "from_json": _from_json,
        "sum": _sum,
        "round": _round,
        "float": _float,
        "trim": _trim,
        "string": lambda value: _budget().text(value),
    }
    environment.filters = {name: charged_filter(name, run) for name, run in {**environment.filters, **own}.items() if name in FILTERS or name in own}
    tests: dict[str, Any] = {**environment.tests}
    environment.tests = {name: charged_test(name, run) for name, run in tests.items() if name in TESTS}
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": Namespace,
        "raise_exception": refuse,
        "strftime_now": lambda layout: datetime.datetime.now().strftime(str(layout)[:200]),
        "__step__": _step,
        "__turn__": _turn,
        "__concat__": lambda *values: "".join(_budget().texts(values)),
        "__made__": lambda value: _budget().made(value),
        "__charged__": _charged,
    }
    environment.policies = {**environment.policies, "json.dumps_function": json.dumps}
    return environment


def _step() -> str:
    _budget().step()
    return ""


def _turn() -> bool:
    _budget().step()
    return True


def _charged(value: Any) -> Any:
    _budget().charge_whole(value)
    return value


def _call(name: str, args: list[Any], at: nodes.Node) -> nodes.Call:
    from jinja2 import nodes

    return nodes.Call(nodes.Name(name, "load", lineno=at.lineno), args, [], None, None, lineno=at.lineno)


def _statement(name: str, at: nodes.Node) -> nodes.Output:
    from jinja2 import nodes

    return nodes.Output([_call(name, [], at)], lineno=at.lineno)


def _check_depth(tree: nodes.Template) -> None:
    """Python itself compiles no more than twenty blocks within each other, and deep expressions end it."""
    from jinja2 import nodes

    level: list[tuple[Any, int, int]] = [(tree, 0, 0)]
    while level:
        node, blocks, depth = level.pop()
        blocks += isinstance(node, nodes.For | nodes.If | nodes.Macro | nodes.CallBlock | nodes.FilterBlock | nodes.With)
        depth += 1
        if blocks > MAX_NESTED or depth > MAX_EXPRESSION:
            refuse("the template is nested too deeply")
        level += [(child, blocks, depth) for child in node.iter_child_nodes()]


# -- filters of our own: transformers' tojson, and those whose results must be measured before they are made


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    budget = _budget()
    size, depth = budget.measure(value)
    indent = indent if indent is None else indent[:MAX_PAD] if isinstance(indent, str) else max(0, min(int(indent), MAX_PAD))
    if separators and any(len(str(separator)) > MAX_PAD for separator in separators):
        refuse("tojson: the separators are too long")
    if isinstance(value, list | tuple | dict | str):
        budget.reserve(budget.length(value) + (0 if indent is None else size * depth * (len(indent) if isinstance(indent, str) else indent) // 4))
    try:
        made = json.dumps(
            value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=tuple(separators) if separators else None, sort_keys=bool(sort_keys)
        )
    except (TypeError, ValueError) as error:
        return str(refuse(f"tojson: {error}"))
    return made


def _from_json(value: Any) -> Any:
    return json.loads(str(value))


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> Any:
    numbers = [entry.get(attribute) if attribute is not None and isinstance(entry, dict) else entry for entry in value]
    if not all(isinstance(n, int | float) for n in (start, *numbers)):
        refuse("sum takes numbers")
    return sum(numbers, start)  # type: ignore[arg-type]


def _round(value: Any, precision: Any = 0, method: str = "common") -> Any:
    from jinja2.filters import do_round

    if abs(int(precision)) > MAX_PRECISION:
        refuse(f"round: the precision is at most {MAX_PRECISION}")
    return do_round(value, int(precision), method)  # type: ignore[arg-type]


def _float(value: Any, default: float = 0.0) -> float:
    from jinja2.filters import do_float

    return default if isinstance(value, str) and len(value) > MAX_NUMERAL else do_float(value, default)


def _trim(value: Any, chars: Any = None) -> str:
    budget = _budget()
    budget.check_strip([chars])
    return str(budget.text(value)).strip(chars)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    budget = _budget()
    text = budget.text(value)
    pad = width[:64] if isinstance(width, str) else " " * max(0, min(int(width), 64))
    budget.reserve(len(text) + len(pad) * (text.count("\n") + 1))
    lines = text.split("\n")
    if len(lines) > MAX_ITEMS:
        refuse("the template builds too long a list")
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *rest])


def _join(value: Any, d: str = "", attribute: Any = None) -> str:
    budget = _budget()
    entries = budget.listed(value)
    if attribute is not None:
        entries = [entry.get(attribute, "") if isinstance(entry, dict) else "" for entry in entries]
    separator = str(budget.text(d))
    return separator.join(budget.texts(list(entries), extra=len(separator)))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = _budget()
    text, old, new = str(budget.text(value)), budget.text(old), budget.text(new)
    budget.check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else int(count))
