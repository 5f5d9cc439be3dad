"""`llmkit tune`, `llmkit convert` and `llmkit quantize`."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Models")(tune)
    app.command(rich_help_panel="Models")(convert)
    app.command(rich_help_panel="Models")(quantize)


def tune(
    model: Annotated[str, typer.Argument(help="Alias or path of a GGUF file.")] = "smollm2",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure which settings make a model fastest on this machine, and remember them."""
    from llmkit.bench import tuner

    found = tuner.tune(model)
    if not json:
        print(found)
        return 0
    facts = {"model": model, "options": found.options, "file": str(found.file)}
    trials = json_module.loads(found.df.to_json(orient="records"))
    print(json_module.dumps({**facts, "speedup": found.speedup, "trials": trials}, indent=2))
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
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Write a model folder (config.json, safetensors) as a GGUF file."""
    from llmkit.models.convert import convert_folder
    from llmkit.models.gguf import read_header
    from llmkit.models.quantization import type_of

    path = convert_folder(folder, output, type)
    if json:
        facts = {"path": str(path), "type": type_of(read_header(path))}
        print(json_module.dumps(facts, indent=2))
    else:
        print(path)
    return 0


def quantize(
    model: Annotated[str, typer.Argument(help="Alias, path or name on the Hub.")],
    type: Annotated[str, typer.Argument(help="Such as Q4_K_M or Q8_0.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="The file to write; by default a copy that `load` finds again."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Write a model's weights in another type."""
    from llmkit.models.quantization import kind_of
    from llmkit.models.registry import resolve
    from llmkit.notebook.progress import Progress, shown_download
    from llmkit.runtime.quantizing import quantized

    kind = kind_of(type)
    with shown_download(model) as on_event:
        spec = resolve(model, on_event=on_event)
    progress = Progress(f"quantizing {spec.name}", 1.0, keep=False)
    try:
        done = quantized(spec, kind, target=out, upward=True, on_progress=progress.update)
    finally:
        progress.close()
    notes = [note for note in (done.note, done.detail) if note]
    if json:
        facts = {"path": str(done.path), "type": kind, "made": done.made, "notes": notes}
        print(json_module.dumps(facts, indent=2))
        return 0
    for note in notes:
        print(f"llmkit: {note}", file=sys.stderr)
    print(done.path)
    return 0
