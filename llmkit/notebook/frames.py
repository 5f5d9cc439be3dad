"""`llm.map`: one prompt for each row of a table, all of them batched; what fails in a row stays in that row."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
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
    kept: list[Stream],
) -> pd.DataFrame:
    """The table with a column of answers and one of errors. ``submit`` takes a prompt; ``window`` of them are under way at a time; ``kept`` gets their
    streams."""
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else pd.DataFrame(frame)
    if not table.columns.is_unique:
        raise InvalidRequestError("two columns of the table have the same name; rename one.", "frame")
    prompts = list(_prompts(table, template))
    answers: list[Answer] = []
    progress = Progress(f"map: {len(prompts)} rows", len(prompts))
    waiting: list[Stream | LLMKitError] = []

    def finish(count: int) -> None:
        while len(waiting) > count:
            answers.append(_result(waiting.pop(0)))
            errors = sum(isinstance(a, LLMKitError) for a in answers)
            progress.update(len(answers), f"{errors} failed" if errors else "")

    try:
        for prompt in prompts:
            finish(window - 1)
            begun = _begin(prompt, submit, kept)
            while isinstance(begun, QueueFullError) and waiting:
                finish(len(waiting) - 1)
                begun = _begin(prompt, submit, kept)
            waiting.append(begun)
        finish(0)
    except BaseException:
        for stream in kept:
            stream.close()
        raise
    finally:
        progress.close()
    found = table.copy()
    found[into] = [text_of(a) if isinstance(a, Completion) else None for a in answers]
    found[f"{into}_error"] = [None if isinstance(a, Completion) else str(a) for a in answers]
    return found


def _begin(prompt: Any, submit: Callable[[Any], Stream], kept: list[Stream]) -> Stream | LLMKitError:
    if isinstance(prompt, LLMKitError):
        return prompt
    try:
        kept.append(submit(prompt))
        return kept[-1]
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
    names = _names(template)
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InvalidRequestError(f"template: there is no column {missing[0]!r}; there are {', '.join(map(str, table.columns))}.", "template")
    for values in table[names].itertuples(index=False, name=None) if names else (() for _ in range(len(table))):
        empty = next((n for n, v in zip(names, values, strict=True) if _is_missing(v)), None)
        if empty is not None:
            yield InvalidRequestError(f"the column {empty!r} is empty in this row.", "template")
            continue
        try:
            yield template.format(**dict(zip(names, values, strict=True)))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            yield InvalidRequestError(f"template: {error}", "template")


def _names(template: str) -> list[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InvalidRequestError(f"template: {error}; write {{{{ for a brace that is text.", "template") from None
    if any(not name.isidentifier() for name in fields):
        bad = next(name for name in fields if not name.isidentifier())
        raise InvalidRequestError(f"template: {{{bad}}} is no column's name; for anything else give a function of the row.", "template")
    return list(dict.fromkeys(fields))


def _is_missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))
