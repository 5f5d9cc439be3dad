"""`llmkit doctor`: what this machine has, what is in the way, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmkit.cli.findings import Finding

__all__ = ["findings", "register"]

TOPICS = 21  # the width of their column


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Tools")(doctor)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Look at this machine and say what to do about it.

    Hardware, llama.cpp, versions, Jupyter, limits, folders, disks, port. The exit status is 1 if
    something is bad.
    """
    from llmkit.cli.findings import as_json, print_findings

    if json:
        found = list(findings())
        print(as_json(found))
        return int(any(finding.level == "bad" for finding in found))
    ok = print_findings(findings(), TOPICS)
    if not ok:
        print("llmkit: something is bad; see above.", file=sys.stderr)
    return int(not ok)


def findings() -> Iterator[Finding]:
    """Everything, each as soon as it is known. What fails is a finding, too."""
    from llmkit.cli import machine, surroundings
    from llmkit.cli.findings import Finding

    known = None
    steps = (
        ("versions", machine.versions),
        ("processor", machine.processor),
        ("memory", machine.memory),
        ("GPU", lambda: machine.gpus(known or machine.Llama())),
        ("llama.cpp", lambda: machine.llama(known or machine.Llama())),
        ("settings", surroundings.settings),
        ("models dir", surroundings.models_dir),
        ("runtime folder", surroundings.runtime_folder),
        ("running models", surroundings.models),
        ("Jupyter extension", surroundings.extension),
        ("Jupyter server", surroundings.servers),
        ("limits", machine.open_limits),
        ("disks", machine.disks),
        ("port", _port),
    )
    for topic, step in steps:
        if topic == "GPU":
            known = machine.ask_llama()
        try:
            yield from step()
        except Exception as error:
            advice = "please report this"
            yield Finding(topic, "warn", f"cannot be looked at: {error!r:.200}", advice)


def _port() -> Iterator[Finding]:
    from llmkit.cli import surroundings
    from llmkit.errors import InvalidRequestError
    from llmkit.settings.gateway import GatewayOptions
    from llmkit.settings.serving import read_settings

    try:
        options = read_settings({}).gateway
    except InvalidRequestError:
        options = GatewayOptions()
    yield from surroundings.port(options.host, options.port)
