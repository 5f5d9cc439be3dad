"""Translates GBNF, as llama.cpp reads it, into llguidance's own language. Pure.

llguidance reads a text in words, the longest first; GBNF has no words. So each character becomes a
word of its own, which is exact; a grammar without recursion becomes one regular expression, which
is faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from llmkit.backend.gbnf_parser import (
    Alt,
    Node,
    Ref,
    Rep,
    Seq,
    Set,
    Token,
    children,
    merged,
    parse,
    refs,
)
from llmkit.errors import InvalidRequestError
from llmkit.protocol.fixpoint import least_fixed_point

__all__ = ["to_lark"]

MAX_ALTERNATIVES = 1900  # distinct ones of one rule; llguidance supports no more


def to_lark(text: str) -> str:
    """The same grammar for llguidance. Raises `InvalidRequestError` that says what is wrong, and in
    which line."""
    rules = parse(text)
    if "root" not in rules:
        raise InvalidRequestError("the grammar has no rule named root.", "grammar")
    ending = _ending(rules)
    if "root" not in ending:
        raise InvalidRequestError(
            "the grammar matches no finite text: its root never ends.", "grammar"
        )
    reached, recursive, tokens = _reached(rules)
    names = {name: f"r{i}" for i, name in enumerate(reached)}
    if not recursive and not tokens:
        names = {name: spelled.upper() for name, spelled in names.items()}
    writer = _Writer(names, ending)
    lines = [f"start: {names['root']}"]
    lines += [
        f"{names[name]}: {writer.alternatives(rules[name])}" for name in reached if name in ending
    ]
    return "\n".join(lines) + "\n"


def _ending(rules: dict[str, Node]) -> set[Hashable]:
    """The rules, by name, and their parts, by identity, that match a finite text."""
    needs: dict[Hashable, Iterator[Sequence[Hashable]]] = {}
    left: list[Node] = list(rules.values())
    while left:
        node = left.pop()
        if id(node) not in needs:
            needs[id(node)] = _needs(node)
            left += children(node)
    needs.update((name, iter([(id(node),)])) for name, node in rules.items())
    return least_fixed_point(needs)


def _needs(node: Node) -> Iterator[Sequence[Hashable]]:
    match node:
        case Set():
            if not node.ranges:
                yield ()
        case Ref():
            yield (node.name,)
        case Seq():
            for part in node.parts:
                yield (id(part),)
        case Alt():
            yield [id(case) for case in node.cases]
        case Rep():
            if node.least:
                yield (id(node.body),)


def _reached(rules: dict[str, Node]) -> tuple[list[str], bool, bool]:
    """The rules reachable from root, whether any of them is recursive, and whether any names
    tokens."""
    order: list[str] = []
    state: dict[str, int] = {}
    recursive = tokens = False
    left: list[tuple[str, bool]] = [("root", False)]
    while left:
        name, done = left.pop()
        if done:
            state[name] = 2
            continue
        if name in state:
            continue
        state[name] = 1
        order.append(name)
        left.append((name, True))
        nodes: list[Node] = [rules[name]]
        while nodes:
            node = nodes.pop()
            tokens |= isinstance(node, Token)
            nodes += children(node)
            if isinstance(node, Ref):
                recursive |= state.get(node.name) == 1
                left.append((node.name, False))
    return order, recursive, tokens


class _Writer:
    def __init__(self, names: dict[str, str], ending: set[Hashable]) -> None:
        self._names, self._ending = names, ending

    def alternatives(self, node: Node) -> str:
        """The right side of a rule, without alternatives that never end."""
        cases = node.cases if isinstance(node, Alt) else (node,)
        able = [case for case in cases if id(case) in self._ending]
        simple = _single_characters(able)
        if simple is not None:
            return self._write(simple)
        if len(able) > MAX_ALTERNATIVES and any(refs(case) for case in able):
            raise InvalidRequestError(
                f"a grammar rule has {len(able)} distinct alternatives; at most "
                f"{MAX_ALTERNATIVES} are supported.",
                "grammar",
            )
        return " | ".join(self._write(case) for case in able) or '""'

    def _write(self, node: Node) -> str:
        match node:
            case Set():
                return (
                    "/["
                    + "".join(
                        f"\\x{{{low:X}}}" if low == high else f"\\x{{{low:X}}}-\\x{{{high:X}}}"
                        for low, high in node.ranges
                    )
                    + "]/"
                )
            case Ref():
                return self._names[node.name]
            case Token():
                return node.spelled
            case Seq():
                return " ".join(self._write(part) for part in node.parts) if node.parts else '""'
            case Alt():
                return f"({self.alternatives(node)})"
            case Rep():
                if id(node.body) not in self._ending or node.most == 0:
                    return '""'
                return f"({self._write(node.body)})" + (
                    f"{{{node.least},}}" if node.most is None else f"{{{node.least},{node.most}}}"
                )


def _single_characters(cases: list[Node]) -> Set | None:
    """Alternatives that are single characters form one class."""
    if len(cases) > 1 and all(isinstance(case, Set) for case in cases):
        return Set(
            tuple(merged([r for case in cases if isinstance(case, Set) for r in case.ranges]))
        )
    return None
