"""`llmkit estimate`, `llmkit profile` and `llmkit bench`."""

from __future__ import annotations

import enum
import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.bench.prompts import WORKLOADS
from llmkit.cli.completing import model_names
from llmkit.cli.options import with_options
from llmkit.errors import InvalidRequestError
from llmkit.settings.options import OPTIONS

if TYPE_CHECKING:
    from llmkit.models.memory import MemoryEstimate

__all__ = ["register"]

Workload = enum.StrEnum("Workload", {name: name for name in WORKLOADS})  # type: ignore[misc]
UNIQUE = Workload("unique")
GIB = 1 << 30
DESCRIPTION = "; ".join(f"{name}: {what}" for name, what in WORKLOADS.items())


Model = Annotated[
    str, typer.Argument(autocompletion=model_names, help="Alias or path of a GGUF file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    engine = [row for name, row in OPTIONS.items() if name != "isolated"]
    app.command(rich_help_panel="Models")(with_options(estimate, engine))
    app.command(rich_help_panel="Models")(with_options(profile, engine))
    app.command(rich_help_panel="Tools")(bench)


def estimate(model: Model, json: Json = False, **given: Any) -> int:
    """Tell what a model would take of memory, from its header alone.

    The exit status is 1 if it does not fit.
    """
    from dataclasses import asdict

    from llmkit.loading import estimate as estimated

    need = estimated(model, **given)
    if json:
        more = {"total_bytes": need.total_bytes, "ram_bytes": need.ram_bytes, "fits": need.fits}
        print(json_module.dumps({"model": model, **asdict(need), **more}, indent=2))
    else:
        print(_estimate_text(model, need))
    return int(not need.fits)


def _estimate_text(model: str, need: MemoryEstimate) -> str:
    rows = [
        ("weights", need.weights_bytes, ""),
        ("KV cache", need.kv_bytes, f"{need.n_slots} x {need.n_ctx} tokens"),
        ("compute", need.compute_bytes, ""),
        ("in RAM", need.ram_bytes, f"of {need.free_bytes / GIB:.2f} free"),
        *((f"on {d.name}", d.num_bytes, f"of {d.free_bytes / GIB:.2f} free") for d in need.devices),
    ]
    verdict = "fits" if need.fits else "does not fit"
    lines = [f"{model}: {need.total_bytes / GIB:.2f} GiB, {verdict}"]
    lines += [f"  {name:10} {size / GIB:8.2f} GiB  {more}".rstrip() for name, size, more in rows]
    return "\n".join([*lines, *([f"faster: {need.hint}"] if need.hint else [])])


def profile(
    model: Model,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts.")] = "32,128,512",
    batch_sizes: Annotated[str, typer.Option(help="Requests side by side.")] = "1,4,8",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    json: Json = False,
    **given: Any,
) -> int:
    """Measure a model's speed by prompt length and batch size."""
    from llmkit.loading import load

    lengths = _numbers(prompt_tokens, "--prompt-tokens")
    sizes = _numbers(batch_sizes, "--batch-sizes")
    with load(model, share=False, **given) as llm:
        done = llm.profile(prompt_tokens=lengths, batch_sizes=sizes, max_tokens=max_tokens)
        table = done.summary()
        if json:
            rows = json_module.loads(table.to_json(orient="records"))
            print(json_module.dumps({"model": llm.name, "rows": rows}, indent=2))
        else:
            print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return 0


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.replace(" ", ",").split(",") if number]
    except ValueError:
        message = f"{option} takes numbers, such as 1,8, not {text!r:.40}."
        raise InvalidRequestError(message, option.strip("-").replace("-", "_")) from None


def bench(
    base_url: Annotated[str, typer.Option(help="The endpoint, such as http://127.0.0.1:3000/v1.")],
    model: str = "default",
    api_key: Annotated[
        str, typer.Option(envvar=["LLMKIT_API_KEY", "OPENAI_API_KEY"], help="Key of the endpoint.")
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

    clients = _numbers(concurrency, "--concurrency")
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
