"""Parses GBNF into a tree of rules; syntax as in llama.cpp, src/llama-grammar.cpp. Pure, and knows
nothing of llguidance except how it spells tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llmkit.errors import InvalidRequestError

__all__ = [
    "Alt",
    "Node",
    "Ref",
    "Rep",
    "Seq",
    "Set",
    "Token",
    "children",
    "merged",
    "parse",
    "refs",
]

MAX_REPEAT = 2000
MAX_DEPTH = 200
LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
NAME = re.compile(r"[A-Za-z0-9_-]+")
TOKEN = re.compile(r"(!?)<(\[(\d+)\]|[^>\n]+)>")
COUNTS = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d+)?\s*)?\}")
ESCAPES = {
    "t": 9,
    "r": 13,
    "n": 10,
    "\\": 92,
    '"': 34,
    "[": 91,
    "]": 93,
    "-": 45,
    "'": 39,
    "/": 47,
    "^": 94,
}
HEX = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Set:
    """One character from these ranges."""

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
    """``most`` None: unbounded."""

    body: Node
    least: int
    most: int | None


Node = Set | Ref | Token | Seq | Alt | Rep


def parse(text: str) -> dict[str, Node]:
    """The rules by name. Raises `InvalidRequestError`."""
    return _Parser(text).rules()


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
                raise self._error(f"unexpected {self.text[self.at]!r}")
            self._space(True)
        for name, node in list(self.known.items()):
            missing = next((r.name for r in refs(node) if r.name not in self.known), None)
            if missing is not None:
                raise InvalidRequestError(
                    f"the grammar's rule {name!r} refers to {missing!r}, which is not defined.",
                    "grammar",
                )
        return self.known

    def _error(self, what: str) -> InvalidRequestError:
        line = self.text.count("\n", 0, min(self.at, len(self.text))) + 1
        return InvalidRequestError(f"the grammar cannot be parsed, line {line}: {what}.", "grammar")

    def _space(self, lines: bool) -> None:
        """Skip blanks and comments, and with ``lines`` line ends too."""
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
        cases: dict[str, Node] = {}  # by text, since some are written twice
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
                    raise self._error(f"a repetition goes up to {MAX_REPEAT}, smaller number first")
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
                raise self._error(f"\\{kind} takes {HEX[kind]} hexadecimal digits of a code point")
            self.at += len(digits)
            return int(digits, 16)
        if kind not in ESCAPES:
            raise self._error(f"\\{kind} is not an escape sequence")
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
            if self.text[self.at : self.at + 1] == "-" and self.text[
                self.at + 1 : self.at + 2
            ] not in ("]", ""):
                self.at += 1
                high = self._character("]")
            if high < low:
                raise self._error("a character range starts after its end")
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            raise self._error("a character class is empty")
        return Set(_complement(ranges) if inverted else _without_surrogates(ranges))

    def _token(self) -> Node:
        match = TOKEN.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if match[3]:
            return Token(f"<[{'^' if match[1] else ''}{match[3]}]>")
        if match[1]:
            raise self._error("a forbidden token is given by number, as in !<[7]>")
        return Token(f"<{match[2]}>")


def children(node: Node) -> tuple[Node, ...]:
    """The direct parts of a node."""
    match node:
        case Seq():
            return node.parts
        case Alt():
            return node.cases
        case Rep():
            return (node.body,)
    return ()


def refs(node: Node) -> list[Ref]:
    """All rule references within a node."""
    result, left = [], [node]
    while left:
        each = left.pop()
        if isinstance(each, Ref):
            result.append(each)
        left += children(each)
    return result


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, joined where they overlap or touch."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(result[-1][1], high))
        else:
            result.append((low, high))
    return result


def _complement(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    result, at = [], 0
    for low, high in merged([*ranges, SURROGATES]):
        if at < low:
            result.append((at, low - 1))
        at = high + 1
    if at <= LAST:
        result.append((at, LAST))
    return tuple(result)


def _without_surrogates(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    first, last = SURROGATES
    cut = [
        part
        for low, high in ranges
        for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
    ]
    return tuple(merged([(low, high) for low, high in cut if low <= high]))
