"""`llm.map`: one prompt for each row of a table, all of them batched; what fails in a row stays in that row."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import EngineGoneError, InvalidRequestError, LLMKitError, ModelUnloadedError, QueueFullError
from llmkit.notebook.progress import Progress
from llmkit.stream import Stream
from llmkit.types import Completion

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["map_rows"]

Answer = Completion | LLMKitError


def map_rows(
    frame: Any,
    template: str | Callable[[Any], Any],
    submit: Callable[[Any], Stream],
    text_of: Callable[[Completion], str],
    into: str,
    window: int,
    made: list[Completion],
    running: list[Stream],
) -> pd.DataFrame:
    """The table with a column of answers and one of errors.

    ``submit`` takes a prompt; ``window`` of them are under way at a time. ``made`` gets the completions (without their tokens: a table may be long),
    ``running`` the streams that still run when it is stopped.
    """
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else pd.DataFrame(frame)
    if not table.columns.is_unique:
        raise InvalidRequestError("two columns of the table have the same name; rename one.", "frame")
    taken = next((name for name in (into, f"{into}_error") if name in table.columns), None)
    if taken is not None:
        raise InvalidRequestError(f"the table has a column {taken!r} already; say where the answers go with into='...'.", "into")
    rows = _Rows(len(table), text_of, made)
    waiting: deque[Stream | LLMKitError] = deque()
    try:
        for prompt in _prompts(table, template):
            while len(waiting) >= window:
                rows.add(waiting.popleft())
            begun = _begin(prompt, submit)
            while isinstance(begun, QueueFullError) and waiting:
                rows.add(waiting.popleft())
                begun = _begin(prompt, submit)
            waiting.append(begun)
        while waiting:
            rows.add(waiting[0])
            waiting.popleft()
    except BaseException:
        running += [s for s in waiting if isinstance(s, Stream)]
        for stream in running:
            stream.close()
        raise
    finally:
        rows.progress.close()
    found = table.copy()
    found[into], found[f"{into}_error"] = rows.answers, rows.errors
    return found


class _Rows:
    """What came of the rows so far."""

    def __init__(self, count: int, text_of: Callable[[Completion], str], made: list[Completion]) -> None:
        self.answers: list[str | None] = []
        self.errors: list[str | None] = []
        self.progress = Progress(f"map: {count} rows", count)
        self._text_of, self._made = text_of, made
        self._num_failed = 0

    def add(self, stream: Stream | LLMKitError) -> None:
        """Wait for a row."""
        result = _result(stream)
        if isinstance(result, Completion):
            self._made.append(replace(result, tokens=(), logprobs=(), prompt_logprobs=()))
            self.answers.append(self._text_of(result))
            self.errors.append(None)
        else:
            self._num_failed += 1
            self.answers.append(None)
            self.errors.append(str(result))
        self.progress.update(len(self.answers), f"{self._num_failed} failed" if self._num_failed else "")


def _begin(prompt: Any, submit: Callable[[Any], Stream]) -> Stream | LLMKitError:
    if isinstance(prompt, LLMKitError):
        return prompt
    try:
        return submit(prompt)
    except (ModelUnloadedError, EngineGoneError):
        raise
    except LLMKitError as error:
        return error


def _result(stream: Stream | LLMKitError) -> Answer:
    if isinstance(stream, LLMKitError):
        return stream
    try:
        return stream.result()
    except (ModelUnloadedError, EngineGoneError):
        raise
    except LLMKitError as error:
        return error


def _prompts(table: pd.DataFrame, template: str | Callable[[Any], Any]) -> Iterator[Any]:
    """The prompt of each row; an error in place of one that cannot be made."""
    if callable(template):
        for _, row in table.iterrows():
            try:
                yield template(row)
            except Exception as error:
                yield InvalidRequestError(f"the template failed: {type(error).__name__}: {error}", "template")
        return
    parts = _parsed(template, table)
    names = list(dict.fromkeys(part[1] for part in parts if part[1] is not None))
    for values in table[names].itertuples(index=False, name=None) if names else (() for _ in range(len(table))):
        cells = dict(zip(names, values, strict=True))
        empty = next((n for n, v in cells.items() if _is_missing(v)), None)
        if empty is not None:
            yield InvalidRequestError(f"the column {empty!r} is empty in this row.", "template")
            continue
        try:
            yield "".join(text + ("" if name is None else _shown(cells[name], conversion, spec)) for text, name, conversion, spec in parts)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            yield InvalidRequestError(f"template: {error}", "template")


Part = tuple[str, Any, str, str]  # text, then a column (None: nothing), how it is converted, and its format


def _parsed(template: str, table: pd.DataFrame) -> list[Part]:
    """A template in its parts. Any column may stand in braces, whatever it is called, with a format behind it as in Python (``{price:.2f}``)."""
    columns: dict[str, Any] = {str(name): name for name in reversed(list(table.columns))}
    parts: list[Part] = []
    text = ""
    at = 0
    while at < len(template):
        c = template[at]
        if template[at : at + 2] in ("{{", "}}"):
            text, at = text + c, at + 2
        elif c == "{":
            end = template.find("}", at)
            if end < 0:
                raise InvalidRequestError("template: a } is missing; write {{ for a brace that is text.", "template")
            parts.append((text, *_place(template[at + 1 : end], columns)))
            text, at = "", end + 1
        elif c == "}":
            raise InvalidRequestError("template: a { is missing; write }} for a brace that is text.", "template")
        else:
            next_ = min((i for i in (template.find("{", at), template.find("}", at)) if i >= 0), default=len(template))
            text, at = text + template[at:next_], next_
    return [*parts, (text, None, "", "")]


def _place(inner: str, columns: dict[str, Any]) -> tuple[Any, str, str]:
    """A column, conversion and format, of what stands in braces."""
    if inner in columns:
        return columns[inner], "", ""
    head, _, spec = inner.rpartition(":")
    if head in columns:
        return columns[head], "", spec
    name, _, spec = inner.partition(":")
    name, _, conversion = name.partition("!")
    if name not in columns:
        raise InvalidRequestError(
            f"template: there is no column {name!r}; there are {', '.join(columns)}. For anything else give a function of the row.", "template"
        )
    if conversion not in ("", "r", "s", "a"):
        raise InvalidRequestError(f"template: {{{inner}}}: after ! comes r, s or a.", "template")
    return columns[name], conversion, spec


def _shown(value: Any, conversion: str, spec: str) -> str:
    conversions: dict[str, Callable[[Any], str]] = {"r": repr, "a": ascii, "s": str}
    return format(conversions[conversion](value) if conversion else value, spec)


def _is_missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))
