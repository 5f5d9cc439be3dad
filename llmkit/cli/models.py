"""`llmkit tune` and `llmkit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Models")(tune)
    app.command(rich_help_panel="Models")(convert)


def tune(
    model: Annotated[str, typer.Argument(help="Alias or path of a GGUF file.")] = "smollm2",
) -> int:
    """Measure which settings make a model fastest on this machine, and remember them."""
    from llmkit.bench import tuner

    print(tuner.tune(model))
    return 0


def convert(
    folder: Annotated[Path, typer.Argument(help="A model folder of the Hugging Face kind.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write; by default beside the folder, with its name."
        ),
    ] = None,
    type: Annotated[
        Literal["f16", "f32", "bf16", "q8_0", "auto"], typer.Option(help="Type of the weights.")
    ] = "f16",
) -> int:
    """Write a model folder (config.json, safetensors) as a GGUF file."""
    from llmkit.models.convert import convert_folder

    print(convert_folder(folder, output, type))
    return 0
