"""The budget of rendering a chat template: steps, time, and the size of every value it creates.

Pure; any thread, each with its own current budget.
"""

from __future__ import annotations

import string
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, NoReturn

__all__ = ["MAX_ITEMS", "MAX_OUTPUT", "Budget", "current_budget", "metered", "refuse"]

MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0  # CPU time of this thread
MAX_OUTPUT = 16 << 20  # characters in one string
MAX_ITEMS = 200_000  # in one list
MAX_VALUES, MAX_DEPTH = 2_000_000, 128  # of a value with everything in it
MAX_TUPLES = 16  # nested: Python's tuple hash recurses on the C stack
MAX_NUMBER_BITS = 4096
CHARACTERS_A_STEP, ITEMS_A_STEP = 256, 16
CHARACTERS_AN_ITEM = CHARACTERS_A_STEP // ITEMS_A_STEP
MAX_STRIPPED = 64  # characters that strip tests for at each position
LOOK_EVERY = 4096  # steps between looks at the clock
PLAIN = (str, int, float, bool, type(None))


def refuse(message: str) -> NoReturn:
    """Fail the rendering: for ``raise_exception``, and for anything out of bounds."""
    import jinja2

    raise jinja2.TemplateError(message)


class Budget:
    """The budget of one rendering. Anything out of bounds raises jinja2's TemplateError."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps
        self._look_at = steps - LOOK_EVERY
        self._seconds = MAX_SECONDS
        self._until = time.thread_time() + MAX_SECONDS
        # Size and depth of measured values, by identity; a template cannot mutate them. The values
        # are kept, so that their ids are not reused.
        self._known: dict[int, tuple[Any, int, int]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Charge this thread's CPU time inside the block.

        Each thread has its own clock, and computes other things between blocks.
        """
        self._until = time.thread_time() + self._seconds
        try:
            yield
        finally:
            self._seconds = self._until - time.thread_time()

    def step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            refuse("the template takes too many steps")
        if self._left < self._look_at:
            self._look_at = self._left - LOOK_EVERY
            if time.thread_time() > self._until:
                refuse("the template takes too long")

    def charge(self, *values: Any) -> None:
        """Charge for handling values, by their size."""
        for value in values:
            if isinstance(value, str):
                self.step(1 + len(value) // CHARACTERS_A_STEP)
            elif isinstance(value, list | tuple | dict | range):
                self.step(1 + len(value) // ITEMS_A_STEP)
            else:
                self.step()

    def charge_whole(self, *values: Any) -> None:
        """The same, with nested values and their strings, as comparisons visit them."""
        for value in values:
            self.charge_often(1, value)

    def charge_often(self, times: int, value: Any) -> None:
        """Charge for visiting a whole value so many times, by its size."""
        if isinstance(value, list | tuple | dict):
            self.step(1 + times * (self.measure(value)[0] // ITEMS_A_STEP))
        elif isinstance(value, str):
            self.step(1 + times * (len(value) // CHARACTERS_A_STEP))
        else:
            self.charge(value)

    def reserve(self, size: int) -> None:
        """Charge for a string of ``size`` characters that is about to be built."""
        if size > MAX_OUTPUT:
            refuse("the template builds too long a string")
        self.step(1 + size // CHARACTERS_A_STEP)

    def made(self, value: Any) -> Any:
        """The result of an operation, if within bounds."""
        if isinstance(value, str):
            if len(value) > MAX_OUTPUT:
                refuse("the template builds too long a string")
            self.step(len(value) // CHARACTERS_A_STEP)
        elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            refuse("the template builds too large a number")
        elif isinstance(value, list | tuple | dict):
            self.measure(value)
            if isinstance(value, tuple) or (
                isinstance(value, list) and any(isinstance(v, tuple) for v in value)
            ):
                for each in [value] if isinstance(value, tuple) else value:
                    self._check_tuple(each)
        elif type(value).__name__ in ("dict_items", "dict_keys", "dict_values"):
            return self.made(list(value))
        return value

    def listed(self, value: Any) -> Any:
        """Iterators as lists: chained iterators recurse on the C stack."""
        if isinstance(value, (*PLAIN, list, tuple, dict, range)) or not hasattr(value, "__next__"):
            return value
        entries = list(islice(value, MAX_ITEMS + 1))
        if len(entries) > MAX_ITEMS:
            refuse("the template builds too long a list")
        self.step(len(entries))
        return entries

    def measure(self, value: Any) -> tuple[int, int]:
        """How many values a value holds, long strings counting as several, and how deeply nested.

        What it holds twice counts twice, since it is printed twice.
        """
        if not isinstance(value, list | tuple | dict):
            return 1, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        entries: Iterable[Any] = value.values() if isinstance(value, dict) else value
        if len(value) > MAX_ITEMS:
            refuse("the template builds too long a list")
        self.step(1 + len(value) // ITEMS_A_STEP)
        size, depth = 1, 0
        for entry in entries:
            if isinstance(entry, list | tuple | dict):
                inner, below = self.measure(entry)
                size, depth = size + inner, max(depth, below)
            else:
                size += 1 + (len(entry) // CHARACTERS_AN_ITEM if isinstance(entry, str) else 0)
        if isinstance(value, dict):
            size += sum(len(key) for key in value if isinstance(key, str)) // CHARACTERS_AN_ITEM
        if size > MAX_VALUES or depth + 1 > MAX_DEPTH:
            refuse("the template builds too large a value")
        self._known[id(value)] = (value, size, depth + 1)
        return size, depth + 1

    def _check_tuple(self, value: Any, level: int = 1) -> None:
        if isinstance(value, tuple):
            if level > MAX_TUPLES:
                refuse("the template nests tuples too deeply")
            for entry in value:
                self._check_tuple(entry, level + 1)

    def text(self, value: Any) -> Any:
        """A value as printed."""
        if isinstance(value, str):
            self.step(1 + len(value) // CHARACTERS_A_STEP)
            return value
        if isinstance(value, int | float | bool | type(None)):
            self.step()
            return str(value)
        if isinstance(value, list | tuple | dict):
            size, _ = self.measure(value)
            self.step(size)
            self.reserve(self.length(value))
            return str(value)
        self.step()
        if type(value).__name__.endswith("Undefined") or hasattr(value, "__html__"):
            return str(value)
        return f"<{type(value).__name__}>"

    def length(self, value: Any) -> int:
        """The approximate length of a value as printed; call only on measured values."""
        if isinstance(value, str):
            return len(value) + 2
        if isinstance(value, dict):
            return (
                sum(len(k) + 4 if isinstance(k, str) else 8 for k in value)
                + sum(map(self.length, value.values()))
                + 2
            )
        if isinstance(value, list | tuple):
            return sum(map(self.length, value)) + 2 * len(value)
        if isinstance(value, PLAIN):
            return 24
        return refuse("the template prints something that is not a value")

    def texts(self, values: Sequence[Any], extra: int = 0) -> list[str]:
        """Values as printed, together within bounds."""
        texts = []
        size = 0
        for value in values:
            text = self.text(value)
            size += len(text) + extra
            if size > MAX_OUTPUT:
                refuse("the template builds too long a string")
            texts.append(text)
        return texts

    def check_call(self, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Charge for a call before it is made; refuse one whose result would be too large."""
        self.charge(*args, *kwargs.values())
        for value in (*args, *kwargs.values()):
            if isinstance(value, tuple):
                self._check_tuple(value)
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if not isinstance(owner, str):
            if isinstance(owner, list | tuple | dict):
                self.charge_whole(owner, *(args if name in ("count", "index") else ()))
            return
        self.charge(owner)
        if name == "title":
            self.charge_often(16, owner)
        elif name in ("strip", "lstrip", "rstrip"):
            self.check_strip(args)
        if (
            name == "replace"
            and len(args) >= 2
            and isinstance(args[0], str)
            and isinstance(args[1], str)
        ):
            self.check_replace(owner, args[0], args[1])
        elif name == "join" and args:
            entries = args[0] if isinstance(args[0], list | tuple | dict | str) else ()
            self.reserve(
                sum(len(e) for e in entries if isinstance(e, str)) + len(owner) * len(entries)
            )
            if not isinstance(args[0], list | tuple | dict | str):
                refuse("join takes a list")
        elif name in ("split", "rsplit", "splitlines"):
            separator = args[0] if args and isinstance(args[0], str) and args[0] else None
            parts = (
                owner.count(separator)
                if separator and name != "splitlines"
                else sum(map(owner.count, " \t\n\r\f\v"))
            )
            if parts > MAX_ITEMS:
                refuse("the template builds too long a list")
            self.step(parts)
        elif name in ("format", "format_map"):
            self._check_format(owner, args, kwargs)

    def _check_format(self, layout: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = len(layout)
        longest = max((len(self.text(v)) for v in (*args, *kwargs.values())), default=0)
        for _, field, spec, conversion in string.Formatter().parse(layout):
            if spec or conversion:
                refuse("format: only plain fields are supported")
            if field is not None:
                if "." in field or "[" in field:
                    refuse("format: only plain fields are supported")
                size += longest
        self.reserve(size)

    def check_strip(self, args: Sequence[Any]) -> None:
        if any(isinstance(arg, str) and len(arg) > MAX_STRIPPED for arg in args):
            refuse(f"strip takes at most {MAX_STRIPPED} characters")

    def check_replace(self, text: str, old: str, new: str) -> None:
        count = text.count(old) if old else len(text) + 1
        self.reserve(len(text) + count * max(0, len(new) - len(old)))

    def check_operation(self, operator: str, left: Any, right: Any) -> None:
        """Refuse an operation whose result would be out of bounds, before computing it."""
        self.charge(left, right)
        sized = [v for v in (left, right) if isinstance(v, str | list | tuple)]
        numbers = [v for v in (left, right) if isinstance(v, int)]
        if operator == "%" and isinstance(left, str):
            refuse("formatting with % is not supported; use ~ instead")
        size = (
            sum(map(len, sized))
            if operator == "+"
            else len(sized[0]) * numbers[0]
            if operator == "*" and sized and numbers
            else 0
        )
        if sized and size > (MAX_OUTPUT if isinstance(sized[0], str) else MAX_ITEMS):
            refuse(
                "the template builds too long a "
                + ("string" if isinstance(sized[0], str) else "list")
            )
        if operator in ("*", "**") and len(numbers) == 2:
            bits = (
                left.bit_length() * max(right, 1)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > MAX_NUMBER_BITS:
                refuse("the template builds too large a number")


_budget: ContextVar[Budget] = ContextVar("llmkit_template_budget")


@contextmanager
def metered(budget: Budget | None = None) -> Iterator[None]:
    """Run templates inside the block on this budget, or on a fresh one."""
    budget = budget or Budget()
    token = _budget.set(budget)
    try:
        with budget.running():
            yield
    finally:
        _budget.reset(token)


def current_budget() -> Budget:
    """The budget of the rendering in progress."""
    try:
        return _budget.get()
    except LookupError:  # while a template is being compiled
        return Budget()
