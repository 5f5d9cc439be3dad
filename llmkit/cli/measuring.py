"""`llmkit bench`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from llmkit.bench.prompts import WORKLOADS
from llmkit.errors import InvalidRequestError

__all__ = ["register"]

Workload = enum.StrEnum("Workload", {name: name for name in WORKLOADS})  # type: ignore[misc]
UNIQUE = Workload("unique")
DESCRIPTION = "; ".join(f"{name}: {what}" for name, what in WORKLOADS.items())


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Models")(bench)


def bench(
    base_url: Annotated[str, typer.Option(help="The endpoint, such as http://127.0.0.1:3000/v1.")],
    model: str = "default",
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")
    ] = "",
    concurrency: Annotated[
        str,
        typer.Option(help="Clients at a time; several numbers, 1,8 say, run one after the other."),
    ] = "1,8",
    requests: Annotated[
        int | None,
        typer.Option(help="Requests for each concurrency (default: twice that, at least 3)."),
    ] = None,
    prompt_words: Annotated[
        int, typer.Option(help="Words of each prompt, about one token each.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    workload: Annotated[Workload, typer.Option(help=DESCRIPTION)] = UNIQUE,
    prefix_words: Annotated[int, typer.Option(help="Of the workload shared-prefix.")] = 1500,
    long_words: Annotated[int, typer.Option(help="Of the workload long.")] = 3000,
    seed: Annotated[int, typer.Option(help="Other seeds are other prompts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> int:
    """Measure any OpenAI-compatible endpoint under load."""
    from llmkit.bench import workload as load

    try:
        clients = [int(number) for number in concurrency.replace(" ", ",").split(",") if number]
    except ValueError:
        message = f"--concurrency takes numbers, such as 1,8, not {concurrency!r:.40}."
        raise InvalidRequestError(message, "concurrency") from None
    return load.main(
        base_url,
        clients=clients,
        requests=requests,
        seed=seed,
        as_json=json,
        model=model,
        api_key=api_key,
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        workload=str(workload),
        prefix_words=prefix_words,
        long_words=long_words,
    )
