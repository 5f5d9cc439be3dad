"""`llm.map`: one prompt per table row, batched; an error in a row stays in that row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import (
    EngineGoneError,
    InvalidRequestError,
    LLMKitError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.notebook.progress import Progress
from llmkit.protocol import Completion
from llmkit.protocol.stream import Stream
from llmkit.sessions.answers import Answers
from llmkit.sessions.batches import Batch
from llmkit.sessions.messages import as_messages
from llmkit.sessions.running import BATCH_WINDOW, Interrupted, is_constrained, make_request

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["map_rows", "map_table"]


def map_table(
    answers: Answers,
    frame: Any,
    template: str | Callable[[Any], Any],
    into: str,
    chat: bool,
    sampling: dict[str, Any],
) -> pd.DataFrame:
    """Implements `LLM.map`. Raises `Interrupted` when stopped."""

    def submit(prompt: Any) -> Stream:
        about: dict[str, Any] = (
            {"messages": as_messages(prompt)}
            if chat or not isinstance(prompt, str)
            else {"prompt": prompt}
        )
        return answers.submit(make_request(sampling, **about))

    def text_of(done: Completion) -> str:
        return answers.reader(constrained).apart(done).text if chat else done.text

    constrained = is_constrained(sampling)
    made: list[Completion] = []
    running: list[Stream] = []
    try:
        return map_rows(frame, template, submit, text_of, into, BATCH_WINDOW, made, running)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the answers so far are in llm.last_batch") from None
    finally:
        answers.runs.keep_completions(made, running)


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
    """A copy of the table with a column of answers and one of errors.

    ``submit`` takes a prompt; at most ``window`` of them run at once. ``made`` collects the
    completions (without their tokens: a table may be long), ``running`` the streams that were still
    running when it was stopped.
    """
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else pd.DataFrame(frame)
    if not table.columns.is_unique:
        raise InvalidRequestError(
            "two columns of the table have the same name; rename one of them.", "frame"
        )
    taken = next((name for name in (into, f"{into}_error") if name in table.columns), None)
    if taken is not None:
        raise InvalidRequestError(
            f"the table already has a column {taken!r}; name another one with into='...'.",
            "into",
        )
    rows = _Rows(len(table), text_of, made)
    batch: Batch[Any] = Batch(lambda prompt: _begin(prompt, submit), window)
    try:
        for result in batch.results(_prompts(table, template)):
            rows.add(result)
    except BaseException:
        running += batch.running
        for each in running:
            each.close()
        raise
    finally:
        rows.progress.close()
    answered = table.copy()
    answered[into], answered[f"{into}_error"] = rows.answers, rows.errors
    return answered


class _Rows:
    """Answers and errors of the rows so far."""

    def __init__(
        self, count: int, text_of: Callable[[Completion], str], made: list[Completion]
    ) -> None:
        self.answers: list[str | None] = []
        self.errors: list[str | None] = []
        self.progress = Progress(f"map: {count} rows", count)
        self._text_of, self._made = text_of, made
        self._num_failed = 0

    def add(self, result: Completion | Exception) -> None:
        """Record what became of a row. Raises what concerns them all."""
        if isinstance(result, Completion):
            self._made.append(replace(result, tokens=(), logprobs=(), prompt_logprobs=()))
            self.answers.append(self._text_of(result))
            self.errors.append(None)
        elif _is_general(result):
            raise result
        else:
            self._num_failed += 1
            self.answers.append(None)
            self.errors.append(str(result))
        self.progress.update(
            len(self.answers), f"{self._num_failed} failed" if self._num_failed else ""
        )


def _begin(prompt: Any, submit: Callable[[Any], Stream]) -> Stream | LLMKitError:
    if isinstance(prompt, LLMKitError):
        return prompt
    try:
        return submit(prompt)
    except LLMKitError as error:
        if _is_general(error) or isinstance(error, QueueFullError):
            raise
        return error


def _is_general(error: Exception) -> bool:
    """Whether it concerns all rows, not a single one."""
    return not isinstance(error, LLMKitError) or isinstance(
        error, ModelUnloadedError | EngineGoneError
    )


def _prompts(table: pd.DataFrame, template: str | Callable[[Any], Any]) -> Iterator[Any]:
    """The prompt of each row; an error in place of a prompt that cannot be built."""
    if callable(template):
        for _, row in table.iterrows():
            try:
                yield template(row)
            except Exception as error:
                yield InvalidRequestError(
                    f"the template failed: {type(error).__name__}: {error}", "template"
                )
        return
    parts = _parsed(template, table)
    names = list(dict.fromkeys(part[1] for part in parts if part[1] is not None))
    for values in (
        table[names].itertuples(index=False, name=None)
        if names
        else (() for _ in range(len(table)))
    ):
        cells = dict(zip(names, values, strict=True))
        empty = next((n for n, v in cells.items() if _is_missing(v)), None)
        if empty is not None:
            yield InvalidRequestError(f"the column {empty!r} is empty in this row.", "template")
            continue
        try:
            yield "".join(
                text + ("" if name is None else _shown(cells[name], conversion, spec))
                for text, name, conversion, spec in parts
            )
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            yield InvalidRequestError(f"template: {error}", "template")


# Text, then a column (None: no column), its conversion and its format.
Part = tuple[str, Any, str, str]


def _parsed(template: str, table: pd.DataFrame) -> list[Part]:
    """A template, parsed.

    Any column name may stand in braces, with a format as in Python (``{price:.2f}``).
    """
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
                raise InvalidRequestError(
                    "template: a } is missing; write {{ for a literal brace.", "template"
                )
            parts.append((text, *_place(template[at + 1 : end], columns)))
            text, at = "", end + 1
        elif c == "}":
            raise InvalidRequestError(
                "template: a { is missing; write }} for a literal brace.", "template"
            )
        else:
            next_ = min(
                (i for i in (template.find("{", at), template.find("}", at)) if i >= 0),
                default=len(template),
            )
            text, at = text + template[at:next_], next_
    return [*parts, (text, None, "", "")]


def _place(inner: str, columns: dict[str, Any]) -> tuple[Any, str, str]:
    """The column, conversion and format of a placeholder."""
    if inner in columns:
        return columns[inner], "", ""
    head, _, spec = inner.rpartition(":")
    if head in columns:
        return columns[head], "", spec
    name, _, spec = inner.partition(":")
    name, _, conversion = name.partition("!")
    if name not in columns:
        raise InvalidRequestError(
            f"template: there is no column {name!r}; the columns are {', '.join(columns)}. "
            "For anything else pass a function of the row.",
            "template",
        )
    if conversion not in ("", "r", "s", "a"):
        raise InvalidRequestError(
            f"template: {{{inner}}}: ! must be followed by r, s or a.", "template"
        )
    return columns[name], conversion, spec


def _shown(value: Any, conversion: str, spec: str) -> str:
    conversions: dict[str, Callable[[Any], str]] = {"r": repr, "a": ascii, "s": str}
    return format(conversions[conversion](value) if conversion else value, spec)


def _is_missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))
