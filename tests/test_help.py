"""Help that fits a screen, completion, exit codes: what every command has in common."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT
from fakes import FakeClient
from terminal import LLMKIT

from llmkit.bridge.server import BridgeServer
from llmkit.cli import app, main
from llmkit.cli.completing import model_names
from llmkit.settings.gateway import GATEWAY_OPTIONS
from llmkit.settings.options import OPTIONS

COMMANDS = (
    "run", "chat", "serve", "engine", "config", "keys", "models", "estimate", "profile", "tune",
    "convert", "quantize", "bench", "doctor", "smoke", "completion", "ray",
)  # fmt: skip


def help_of(*args: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([*args]) == 0
    return capsys.readouterr().out.rstrip("\n").split("\n")


def test_the_first_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of("--help", capsys=capsys)
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, "\n".join(lines)
    text = "\n".join(lines)
    for command in COMMANDS:
        assert f"  {command} " in text, command


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(command, "--help", capsys=capsys)
    assert len(lines) <= 45, len(lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("command", ["serve", "engine", "run"])
def test_many_options_are_shown_in_two_steps(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = help_of(command, "--help", capsys=capsys)
    assert len(short) <= 30 and any("--help-all" in line for line in short)
    assert any("--n-ctx" in line for line in short)
    whole = "\n".join(help_of(command, "--help-all", capsys=capsys))
    rows = [row for name, row in OPTIONS.items() if name != "isolated"]
    rows += [r for n, r in GATEWAY_OPTIONS.items() if n != "model"] if command == "serve" else []
    for row in rows:
        assert f"--{row.name.replace('_', '-')}" in whole, row.name
        assert " ".join(row.help.split()[:3]) in whole, row.name


def test_a_value_may_be_spelled_like_that_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--help-all"]) == 2 and "--help-all" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["20", "50", "80", "200"])
def test_help_at_other_widths(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for args in (["--help"], ["serve", "--help"], ["serve", "--help-all"]):
        lines = help_of(*args, capsys=capsys)
        assert max(map(len, lines)) <= max(60, min(int(columns), 100))


def test_help_is_quick() -> None:
    """What takes time is to load modules: it needs few, and none that takes long."""
    command = [sys.executable, "-X", "importtime", *LLMKIT[1:], "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "llmkit.cli.app" in modules and len(modules) < 300, len(modules)
    slow = {"numpy", "llama_cpp", "tornado", "jinja2", "zmq", "sqlalchemy", "rich", "msgspec"}
    assert not slow & {name.partition(".")[0] for name in modules}


def test_usage_errors_are_2_and_suggest(capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["srve"], "Did you mean 'serve'"),
        (["serve", "--prot", "1"], "--port"),
        (["chat", "--file"], "--file"),
        (["smoke", "--timeout", "0"], "--timeout"),
        (["completion", "tcsh"], "bash"),
        (["run"], "model"),
    ):
        assert main(args) == 2, args
        assert words in capsys.readouterr().err, args


SETTINGS = {"--" + name.replace("_", "-") for name in (*GATEWAY_OPTIONS, *OPTIONS)}


def test_the_pages_show_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, str] = {}
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in re.findall(r"(?:^|[| (]|/bin/)llmkit ([^\n#|)>]*)", block, re.M):
                words = line.split()
                if not words or not words[0].isalpha():
                    continue
                group = words[0] in ("models", "keys", "config", "ray") and len(words) > 1
                command = " ".join(words[: 1 + group])
                if command not in known:
                    assert main([*command.split(), "--help"]) == 0, f"{page}: {line}"
                    known[command] = capsys.readouterr().out
                for option in re.findall(r"(?<!\S)(--[a-z-]+)", line):
                    shown = option in known[command] or option.replace("--no-", "--") in SETTINGS
                    assert shown, f"{page}: llmkit {line}"
    assert {"chat", "run", "doctor", "smoke", "completion"} <= set(known)


# Completion


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> str:
    """A PATH on which `llmkit` is this one."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def completed(words: list[str], path: str, folder: Path) -> list[str]:
    """What bash would offer."""
    script = f"""
        eval "$(llmkit completion bash)"
        COMP_WORDS=({" ".join(repr(word) for word in words)})
        COMP_CWORD={len(words) - 1}
        _llmkit_completion llmkit
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_and_models(
    path: str, tmp_path: Path, fake: FakeClient
) -> None:
    (tmp_path / "mine.gguf").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "models").mkdir()
    assert completed(["llmkit", "ser"], path, tmp_path) == ["serve"]
    assert completed(["llmkit", "chat", "--base"], path, tmp_path) == ["--base-url"]
    assert completed(["llmkit", "run", "smo"], path, tmp_path) == ["smollm2"]
    assert completed(["llmkit", "run", "m"], path, tmp_path) == ["minilm", "mine.gguf", "models/"]
    bridge = BridgeServer(fake)
    assert completed(["llmkit", "chat", "-m", "fak"], path, tmp_path) == ["fake"]
    bridge.close()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_right_for_their_shells(shell: str, path: str) -> None:
    done = subprocess.run(
        [*LLMKIT, "completion", shell], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("# ") and "_LLMKIT_COMPLETE=complete_" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    "text", ["", "/", "~", "~nobody-of-this-name/", "\0", "a" * 5000, "/nowhere/x/", "../", "--x"]
)
def test_completing_never_fails(text: str) -> None:
    assert all(name.startswith(text) for name in model_names(text))


def commands(built: typer.Typer) -> list[str]:
    names = [c.name or c.callback.__name__ for c in built.registered_commands]  # type: ignore[union-attr]
    return names + [str(g.name or g.typer_instance.info.name) for g in built.registered_groups]  # type: ignore[union-attr]


def test_every_command_is_registered_once_by_the_module_that_is_named() -> None:
    names = commands(app.built())
    assert sorted(names) == sorted(set(names)) and set(COMMANDS) <= set(names)
    for own in app.GROUPS.values():
        for name in own:
            assert commands(app.built(name)) == [*own]
    assert commands(app.built("--version")) == names == commands(app.built("srve"))


def test_a_command_needs_no_other() -> None:
    code = (
        "import sys; from llmkit.cli import main; main(['estimate', '--help']); "
        "sys.exit('llmkit.cli.chatting' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
