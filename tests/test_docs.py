"""The pages say what is so: layers, files, settings and examples; and they are easy to edit."""

from __future__ import annotations

import ast
import configparser
import doctest
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from llmkit import errors
from llmkit.cluster.ray_file import read_fleet
from llmkit.settings.document import Document
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.options import OPTIONS
from llmkit.settings.reading import Reading

DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted(p for p in DOCS.rglob("*.md") if "lessons" not in p.relative_to(DOCS).parts)
TEXTS = [*PAGES, ROOT / "README.md"]
COLUMNS = 100
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
SETTINGS = {**GATEWAY_OPTIONS, **OPTIONS}


def blocks(language: str) -> list[tuple[str, str]]:
    """Where each fenced block of a language is, and its text."""
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for block in FENCE.finditer(text):
            if block[1] == language:
                line = text.count("\n", 0, block.start()) + 1
                found.append((f"{path.relative_to(ROOT)}:{line}", block[2]))
    return found


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_layers_of_the_page_are_those_that_are_checked() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".ci" / "importlinter.ini")
    layers = config["importlinter:contract:layers"]["layers"].strip().splitlines()
    shown = [text for language, text in FENCE.findall(ARCHITECTURE) if "llmkit.errors\n" in text]
    assert [block.strip().splitlines() for block in shown] == [[line.strip() for line in layers]]


def test_every_room_is_described() -> None:
    rooms = {p.parent.name for p in (ROOT / "llmkit").glob("*/__init__.py")}
    table = ARCHITECTURE.partition("| room | owns |")[2].partition("\n\n")[0]
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE))


def test_the_files_that_the_architecture_names_exist() -> None:
    named = set(re.findall(r"`([\w/.-]+/[\w.-]+\.py)`", ARCHITECTURE))
    assert len(named) > 40
    assert [file for file in sorted(named) if not (ROOT / "llmkit" / file).is_file()] == []


@pytest.mark.parametrize("path", [*TEXTS, ROOT / "CHANGELOG.md"], ids=name)
def test_lines_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [
        f"{i}: {line}"
        for i, line in enumerate(lines, 1)
        if len(line) > COLUMNS and not line.startswith("|")
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target, anchor in LINK.findall(prose(path)):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(h) for h in headings], f"{target}#{anchor}"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_a_list_of_pages() -> None:
    listed = {DOCS / "index.md"}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for entries in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for entry in entries.split("\n"):
                target = re.sub(r"^.*<(.*)>$", r"\1", entry.strip())
                listed.add((path.parent / f"{target}.md").resolve())
    assert [name(p) for p in PAGES if p.resolve() not in listed] == []


@pytest.mark.parametrize("at, text", blocks("python"))
def test_examples_are_python(at: str, text: str) -> None:
    if ">>>" in text:
        parsed = doctest.DocTestParser().get_doctest(text, {}, at, None, None)
        runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        assert runner.run(parsed).failed == 0
    else:
        compile(text, at, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_some_examples_run() -> None:
    assert sum(">>>" in text for _, text in blocks("python")) >= 2


@pytest.mark.parametrize("at, text", blocks("toml"))
def test_settings_files_hold_settings(at: str, text: str, tmp_path: Path) -> None:
    if "gateways = " in text:  # of `llmkit ray`
        (tmp_path / "fleet.toml").write_text(text)
        assert read_fleet(tmp_path / "fleet.toml").models
        return
    reading = Reading()
    reading.take_document(Document(Path(at), tomllib.loads(text)))
    assert not reading.faults


@pytest.mark.parametrize("at, text", blocks("sh"))
def test_commands_take_the_options_that_are_shown(at: str, text: str) -> None:
    for options in re.findall(r"\bllmkit serve\b([^#\n]*)", text):
        for option in re.findall(r"--([a-z-]+)", options):
            assert option.replace("-", "_") in {*SETTINGS, "config", "attach"}, option


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    page = """<h1 id="here">Pages</h1> <a href="#here">a</a> <a href="b.html#there">b</a>
        <a href="https://example.org/">c</a> <a href="#gone">d</a> <a href="gone.html">e</a>
        <a href="../up.html">f</a> <a href="https:/example.org">g</a>
        <script src="https://example.org/x.js"></script>"""
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "links.py"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == [
        "no such anchor",
        "no such file",
        "leads out of the pages",
        "is no web address",
        "is loaded from another site",
    ]


def test_the_reference_has_every_error() -> None:
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    for error in errors.__all__:
        assert f"autoexception:: llmkit.{error}\n" in text, error
