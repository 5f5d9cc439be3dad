"""What a check found, for people and as JSON: `llmkit doctor` and `llmkit smoke`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmkit.cli.terminal import stripped

__all__ = ["Finding", "Level", "as_json", "print_findings", "shown"]

Level = Literal["ok", "warn", "bad", "none"]
COLORS: dict[Level, str] = {
    "ok": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[31m", "none": "\x1b[2m"
}  # fmt: skip
WORDS: dict[Level, str] = {"ok": "ok", "warn": "warn", "bad": "BAD", "none": "-"}
PLAIN = "\x1b[0m"
MIN_WIDTH, MAX_WIDTH = 40, 110


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it.

    ``none``: it is not there, and need not be. ``seconds``: how long it took, where that matters.
    """

    topic: str
    level: Level
    text: str
    advice: str = ""
    seconds: float | None = None


def as_json(findings: Iterable[Finding], **more: Any) -> str:
    """One object; ``ok`` is whether nothing is bad."""
    rows = list(findings)
    ok = all(row.level != "bad" for row in rows)
    listed = [{k: v for k, v in asdict(row).items() if v is not None} for row in rows]
    return json.dumps({"ok": ok, **more, "findings": listed}, indent=2)


def shown(finding: Finding, topics: int, *, styled: bool, width: int) -> str:
    """The lines of one finding; ``topics`` is the width of the topics."""
    word = f"{WORDS[finding.level]:4}"
    if styled:
        word = f"{COLORS[finding.level]}{word}{PLAIN}"
    time = "" if finding.seconds is None else f"{finding.seconds:6.2f} s  "
    indent = " " * (4 + 2 + topics + 2 + len(time))
    lines = _wrapped(stripped(finding.text), width - len(indent))
    for paragraph in stripped(finding.advice).split("\n"):
        if paragraph.startswith(" "):
            lines.append(paragraph)  # a command, to be copied
        elif paragraph:
            lines += _wrapped(paragraph, width - len(indent))
    first, *others = lines or [""]
    head = f"{word}  {finding.topic:{topics}}  {time}{first}"
    return "\n".join([head.rstrip(), *(f"{indent}{line}".rstrip() for line in others)])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def print_findings(findings: Iterable[Finding], topics: int) -> bool:
    """Print each as it comes; whether nothing is bad."""
    styled = (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    width = max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns))
    ok = True
    for finding in findings:
        ok = ok and finding.level != "bad"
        print(shown(finding, topics, styled=styled, width=width), flush=True)
    return ok
