"""GBNF, as llama.cpp reads it, in llguidance's own language. Pure.

llguidance reads a text in words, the longest first; GBNF has no words. So each character is a word of its own here, which is exact; a grammar that does not
refer to itself becomes one regular expression, which is faster. Syntax: llama.cpp, src/llama-grammar.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from llmkit.errors import InvalidRequestError
from llmkit.fixpoint import least_fixed_point

__all__ = ["to_lark"]

MAX_REPEAT = 2000
MAX_ALTERNATIVES = 1900  # of one rule, and different; llguidance keeps no more apart
MAX_DEPTH = 200
LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
NAME = re.compile(r"[A-Za-z0-9_-]+")
TOKEN = re.compile(r"(!?)<(\[(\d+)\]|[^>\n]+)>")
COUNTS = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d+)?\s*)?\}")
ESCAPES = {"t": 9, "r": 13, "n": 10, "\\": 92, '"': 34, "[": 91, "]": 93, "-": 45, "'": 39, "/": 47, "^": 94}
HEX = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Set:
    """One character of these ranges."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Ref:
    name: str


@dataclass(frozen=True)
class Token:
    """One token of the vocabulary, as llguidance spells it."""

    spelled: str


@dataclass(frozen=True)
class Seq:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    cases: tuple[Node, ...]


@dataclass(frozen=True)
class Rep:
    """``most`` None: without end."""

    body: Node
    least: int
    most: int | None


Node = Set | Ref | Token | Seq | Alt | Rep


def to_lark(text: str) -> str:
    """The same grammar for llguidance. Raises `InvalidRequestError` that says what is wrong, and in which line."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise InvalidRequestError("the grammar has no rule named root.", "grammar")
    ending = _ending(rules)
    if "root" not in ending:
        raise InvalidRequestError("the grammar has no finite text: its root never comes to an end.", "grammar")
    reached, recursive, tokens = _reached(rules)
    names = {name: f"r{i}" for i, name in enumerate(reached)}
    if not recursive and not tokens:
        names = {name: spelled.upper() for name, spelled in names.items()}
    writer = _Writer(names, ending)
    lines = [f"start: {names['root']}"]
    lines += [f"{names[name]}: {writer.alternatives(rules[name])}" for name in reached if name in ending]
    return "\n".join(lines) + "\n"


@dataclass
class _Parser:
    text: str
    at: int = 0
    known: dict[str, Node] = field(default_factory=dict)

    def rules(self) -> dict[str, Node]:
        self._space(True)
        while self.at < len(self.text):
            name = self._name()
            self._space(False)
            if not self.text.startswith("::=", self.at):
                raise self._error("::= is missing")
            self.at += 3
            self._space(True)
            self.known[name] = self._cases(0)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self._error(f"{self.text[self.at]!r} is not expected")
            self._space(True)
        for name, node in list(self.known.items()):
            missing = next((r.name for r in _refs(node) if r.name not in self.known), None)
            if missing is not None:
                raise InvalidRequestError(f"the grammar's rule {name!r} refers to {missing!r}, which is not there.", "grammar")
        return self.known

    def _error(self, what: str) -> InvalidRequestError:
        line = self.text.count("\n", 0, min(self.at, len(self.text))) + 1
        return InvalidRequestError(f"the grammar cannot be read: {what} in line {line}.", "grammar")

    def _space(self, lines: bool) -> None:
        """Pass over blanks and comments, and over ends of ``lines`` where they mean nothing."""
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == "#":
                while self.at < len(self.text) and self.text[self.at] not in "\r\n":
                    self.at += 1
            elif c in " \t" or (lines and c in "\r\n"):
                self.at += 1
            else:
                return

    def _name(self) -> str:
        match = NAME.match(self.text, self.at)
        if match is None:
            raise self._error("a name is missing")
        self.at = match.end()
        return match[0]

    def _cases(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._error("parentheses are nested too deeply")
        cases: dict[str, Node] = {}  # by their text, since some are written twice
        while True:
            begin = self.at
            case = self._sequence(depth)
            cases.setdefault(self.text[begin : self.at].strip(), case)
            if self.at >= len(self.text) or self.text[self.at] != "|":
                break
            self.at += 1
            self._space(True)
        return next(iter(cases.values())) if len(cases) == 1 else Alt(tuple(cases.values()))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == '"':
                parts.append(self._literal())
            elif c == "[":
                parts.append(self._class())
            elif c == ".":
                self.at += 1
                parts.append(Set(_complement([])))
            elif c == "(":
                self.at += 1
                self._space(True)
                parts.append(self._cases(depth + 1))
                if self.at >= len(self.text) or self.text[self.at] != ")":
                    raise self._error("a ) is missing")
                self.at += 1
            elif TOKEN.match(self.text, self.at):
                parts.append(self._token())
            elif NAME.match(self.text, self.at):
                parts.append(Ref(self._name()))
            else:
                break
            self._space(depth > 0)
            parts[-1] = self._repeated(parts[-1], depth)
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _repeated(self, body: Node, depth: int) -> Node:
        while self.at < len(self.text) and self.text[self.at] in "*+?{":
            c = self.text[self.at]
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(c, (0, 0))
            if c == "{":
                match = COUNTS.match(self.text, self.at)
                if match is None or len(match[1]) > 6 or len(match[3] or "") > 6:
                    raise self._error("a repetition is {m}, {m,} or {m,n}")
                least = int(match[1])
                most = int(match[3]) if match[3] else None if match[2] else least
                if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
                    raise self._error(f"a repetition counts up to {MAX_REPEAT}, the smaller number first")
                self.at = match.end()
            else:
                self.at += 1
            body = Rep(body, least, most)
            self._space(depth > 0)
        return body

    def _character(self, end: str) -> int:
        c = self.text[self.at] if self.at < len(self.text) else ""
        self.at += 1
        if not c:
            raise self._error(f"a {end} is missing")
        if c != "\\":
            return ord(c)
        kind = self.text[self.at : self.at + 1]
        self.at += 1
        if kind in HEX:
            digits = self.text[self.at : self.at + HEX[kind]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{HEX[kind]}}}", digits) or int(digits, 16) > LAST:
                raise self._error(f"\\{kind} takes {HEX[kind]} hexadecimal digits of a character")
            self.at += len(digits)
            return int(digits, 16)
        if kind not in ESCAPES:
            raise self._error(f"\\{kind} is no character")
        return ESCAPES[kind]

    def _literal(self) -> Node:
        self.at += 1
        parts: list[Node] = []
        while self.text[self.at : self.at + 1] != '"':
            code = self._character('"')
            parts.append(Set(_without_surrogates([(code, code)])))
        self.at += 1
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _class(self) -> Node:
        self.at += 1
        inverted = self.text[self.at : self.at + 1] == "^"
        self.at += inverted
        ranges: list[tuple[int, int]] = []
        while self.text[self.at : self.at + 1] != "]":
            low = high = self._character("]")
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._character("]")
            if high < low:
                raise self._error("a range of characters begins after its end")
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            raise self._error("a class of characters is empty")
        return Set(_complement(ranges) if inverted else _without_surrogates(ranges))

    def _token(self) -> Node:
        match = TOKEN.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if match[3]:
            return Token(f"<[{'^' if match[1] else ''}{match[3]}]>")
        if match[1]:
            raise self._error("which token must not come is said by its number, as in !<[7]>")
        return Token(f"<{match[2]}>")


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _complement(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found, at = [], 0
    for low, high in _merged([*ranges, SURROGATES]):
        if at < low:
            found.append((at, low - 1))
        at = high + 1
    if at <= LAST:
        found.append((at, LAST))
    return tuple(found)


def _without_surrogates(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    first, last = SURROGATES
    cut = [part for low, high in ranges for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    return tuple(_merged([(low, high) for low, high in cut if low <= high]))


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Seq():
            return node.parts
        case Alt():
            return node.cases
        case Rep():
            return (node.body,)
    return ()


def _refs(node: Node) -> list[Ref]:
    found, left = [], [node]
    while left:
        each = left.pop()
        if isinstance(each, Ref):
            found.append(each)
        left += _children(each)
    return found


def _ending(rules: dict[str, Node]) -> set[Hashable]:
    """The rules, by name, and their parts, by identity, that have a finite text."""
    needs: dict[Hashable, Iterator[Sequence[Hashable]]] = {}
    left: list[Node] = list(rules.values())
    while left:
        node = left.pop()
        if id(node) not in needs:
            needs[id(node)] = _needs(node)
            left += _children(node)
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
    """The rules that root reaches, whether any of them refers to itself, and whether any names tokens."""
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
            nodes += _children(node)
            if isinstance(node, Ref):
                recursive |= state.get(node.name) == 1
                left.append((node.name, False))
    return order, recursive, tokens


class _Writer:
    def __init__(self, names: dict[str, str], ending: set[Hashable]) -> None:
        self._names, self._ending = names, ending

    def alternatives(self, node: Node) -> str:
        """The right side of a rule; cases that never end are left out."""
        cases = node.cases if isinstance(node, Alt) else (node,)
        able = [case for case in cases if id(case) in self._ending]
        simple = _single_characters(able)
        if simple is not None:
            return self._write(simple)
        if len(able) > MAX_ALTERNATIVES and any(_refs(case) for case in able):
            raise InvalidRequestError(f"a rule of the grammar has {len(able)} different cases; at most {MAX_ALTERNATIVES} can be kept apart.", "grammar")
        return " | ".join(self._write(case) for case in able) or '""'

    def _write(self, node: Node) -> str:
        match node:
            case Set():
                return "/[" + "".join(f"\\x{{{low:X}}}" if low == high else f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in node.ranges) + "]/"
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
                return f"({self._write(node.body)})" + (f"{{{node.least},}}" if node.most is None else f"{{{node.least},{node.most}}}")


def _single_characters(cases: list[Node]) -> Set | None:
    """Cases that are single characters are one class."""
    if len(cases) > 1 and all(isinstance(case, Set) for case in cases):
        return Set(tuple(_merged([r for case in cases if isinstance(case, Set) for r in case.ranges])))
    return None
