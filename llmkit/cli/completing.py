"""What the shell completes: names of models; and the scripts that teach it to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["model_names", "register"]

MOST = 200
USAGE = {
    "bash": 'eval "$(llmkit completion bash)"      # in ~/.bashrc',
    "zsh": 'eval "$(llmkit completion zsh)"       # in ~/.zshrc, after compinit',
    "fish": "llmkit completion fish | source        # in ~/.config/fish/config.fish",
}


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Tools")(completion)


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell.")],
) -> int:
    """Print the script that completes commands and models.

    For example `eval "$(llmkit completion bash)"` in ~/.bashrc.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(
        prog_name="llmkit", complete_var="_LLMKIT_COMPLETE", shell=str(shell)
    )
    print(f"# {USAGE[str(shell)]}\n{script}")
    return 0


def model_names(incomplete: str) -> list[str]:
    """Aliases, running models and GGUF files that begin so. Never fails: Tab must not."""
    with contextlib.suppress(Exception):
        return [name for name in _names(incomplete) if name.startswith(incomplete)][:MOST]
    return []


def _names(incomplete: str) -> list[str]:
    from llmkit.bridge.connection import find_connections
    from llmkit.models.registry import ALIASES

    names = dict.fromkeys(ALIASES)
    with contextlib.suppress(OSError):
        names |= dict.fromkeys(connection.model.name for connection in find_connections())
    with contextlib.suppress(OSError, RuntimeError):
        folder, slash, _ = incomplete.rpartition("/")
        where = Path(f"{folder}{slash}" or ".").expanduser()
        for path in sorted(where.iterdir())[: 10 * MOST]:
            if path.is_dir() and not path.name.startswith("."):
                names[f"{folder}{slash}{path.name}/"] = None
            elif path.suffix == ".gguf":
                names[f"{folder}{slash}{path.name}"] = None
    return list(names)
