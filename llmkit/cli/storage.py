"""`llmkit models`: the models on this machine, and those of a running gateway."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.errors import InvalidRequestError, LLMKitError

if TYPE_CHECKING:
    from llmkit.models.library import Library, StoredModel

__all__ = ["register"]

Folder = Annotated[
    Path | None,
    typer.Option(
        "--models-dir",
        envvar="LLMKIT_MODELS_DIR",
        help="Folder of models.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Url = Annotated[
    str, typer.Option("--base-url", help="A running gateway, such as http://127.0.0.1:3000/v1.")
]
Key = Annotated[
    str, typer.Option("--api-key", help="Key of the gateway; better in $LLMKIT_API_KEY.")
]
LOCAL = "http://127.0.0.1:3000/v1"


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Models on this machine and in a running gateway.", no_args_is_help=True
    )
    for command in (list_models, pull, info, rm, load, unload):
        group.command(command.__name__.removesuffix("_models"))(command)
    app.add_typer(group, name="models", rich_help_panel="Models")


def _library(folder: Path | None) -> Library:
    from llmkit.models.library import Library, check_folder

    if folder is not None:
        check_folder(folder)
    return Library(folder)


def _print_json(value: Any) -> None:
    print(json_module.dumps(value, indent=2))


def list_models(
    models_dir: Folder = None, base_url: Url = "", api_key: Key = "", json: Json = False
) -> int:
    """List models on disk, or with --base-url a gateway's."""
    from llmkit.models.library import table_of

    if base_url:
        from llmkit.cli.remote import models_of

        served = models_of(base_url, api_key)
        if json:
            _print_json({"models": served})
        else:
            rows = [{k: _text(k, m.get(k)) for k in SHOWN} for m in served]
            print(table_of(rows) or "the gateway has no model")
        return 0
    listing = _library(models_dir).models()
    if json:
        _print_json({"models": [m.as_dict() for m in listing], "problems": listing.problems})
        return 0
    print(table_of(listing.rows()) or "no model is on this machine")
    for problem in listing.problems:
        print(f"llmkit: {problem}", file=sys.stderr)
    return 0


SHOWN = (
    "id",
    "phase",
    "is_default",
    "pinned",
    "num_used",
    "ram_bytes",
    "gpu_bytes",
    "size_bytes",
    "reason",
)


def _text(name: str, value: Any) -> str:
    """A value for people; nothing for what is not so."""
    from llmkit.models.names import gigabytes
    from llmkit.system.text import printable

    if value in (None, "", [], 0, False):
        return ""
    if name.endswith("_bytes") and isinstance(value, int):
        return gigabytes(value)
    return printable("yes" if value is True else str(value))


def pull(
    name: Annotated[str, typer.Argument(help="org/repo:file.gguf, org/repo:Q4_K_M, or org/repo.")],
    models_dir: Folder = None,
    mmproj: Annotated[
        bool, typer.Option("--mmproj", help="Also the file that reads pictures.")
    ] = False,
    json: Json = False,
) -> int:
    """Download a model from the Hugging Face Hub.

    What an earlier try left is taken up, and the checksum is compared.
    """
    from llmkit.models.download import download
    from llmkit.notebook.progress import shown_download

    with shown_download(name) as on_event:
        done = download(name, models_dir=models_dir, mmproj=mmproj, on_event=on_event)
    if json:
        paths = {"path": str(done.path), "files": [str(f) for f in done.files]}
        projector = None if done.mmproj is None else str(done.mmproj)
        _print_json({"id": done.name, **paths, "mmproj": projector})
        return 0
    if done.name != name:
        print(f"llmkit: took {done.name}", file=sys.stderr)
    print(done.path)
    return 0


Named = Annotated[str, typer.Argument(help="A name that `llmkit models list` shows, or a path.")]


def info(model: Named, models_dir: Folder = None, json: Json = False) -> int:
    """Tell what a model's file says of itself."""
    from llmkit.models.gguf import read_header

    stored, path = _named(model, models_dir)
    facts: dict[str, Any] = {} if stored is None else stored.as_dict()
    if stored is None or not stored.fault:
        facts |= _facts(path)
    if json:
        if not facts.get("fault"):
            header = read_header(path).metadata
            facts["metadata"] = {k: v for k, v in header.items() if not isinstance(v, list)}
        _print_json(facts)
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        texts = [_text(name, v) for v in (value if isinstance(value, list) else [value])]
        if any(texts) and name != "modified":
            print(f"{name:{width}}  " + f"\n{'':{width}}  ".join(texts))
    return 0


def _named(model: str, folder: Path | None) -> tuple[StoredModel | None, Path]:
    """A model on disk, or another file at that path."""
    from llmkit.models.registry import resolve

    library = _library(folder)
    try:
        stored = library.find(model)
        return stored, stored.path if stored.fault else library.resolve(stored.id).path
    except LLMKitError:
        if Path(model).is_file():
            return None, resolve(model).path
        raise


def _facts(path: Path) -> dict[str, Any]:
    from llmkit.models.copies import copies_of
    from llmkit.models.gguf import read_header
    from llmkit.models.quantization import bits_of, type_of

    header = read_header(path)
    said = header.metadata
    return {
        "path": str(path),
        "size_bytes": header.file_bytes,
        "quantization": type_of(header),
        "bits_per_weight": round(bits_of(header), 2),
        "architecture": header.architecture,
        "layers": header.integer("block_count"),
        "n_ctx": header.n_ctx_train,
        "chat_template": "tokenizer.chat_template" in said,
        "license": str(said.get("general.license", "")),
        "copies": [str(copy) for copy in copies_of(header.files)],
    }


def rm(
    model: Named,
    models_dir: Folder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> int:
    """Remove a model's files.

    From the models dir or Hugging Face's cache, with the copies that llmkit made of it; nothing
    else.
    """
    from llmkit.models.names import gigabytes
    from llmkit.models.removal import files_to_remove, remove
    from llmkit.system.text import printable

    library = _library(models_dir)
    stored = library.find(model)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidRequestError("rm asks before it removes; add --yes to do without.", "yes")
        for file in files_to_remove(library, stored):
            print(printable(str(file)), file=sys.stderr)
        typer.confirm(f"Remove {stored.id}?", abort=True, err=True)
    removed = remove(library, stored)
    if json:
        files = [printable(str(f)) for f in removed.files]
        _print_json({"id": stored.id, "files": files, "size_bytes": removed.size_bytes})
    else:
        print(f"removed {stored.id}: {gigabytes(removed.size_bytes)}")
    return 0


Served = Annotated[str, typer.Argument(help="A model of the gateway.")]


def load(model: Served, base_url: Url = LOCAL, api_key: Key = "", json: Json = False) -> int:
    """Load a model in a running gateway."""
    return _act("load", model, base_url, api_key, json)


def unload(
    model: Served,
    base_url: Url = LOCAL,
    api_key: Key = "",
    force: Annotated[bool, typer.Option("--force", help="End its requests.")] = False,
    json: Json = False,
) -> int:
    """Unload a model in a running gateway.

    Its requests finish first, unless --force ends them.
    """
    return _act("unload", model, base_url, api_key, json, force=force)


def _act(what: str, model: str, base_url: str, api_key: str, json: bool, **more: Any) -> int:
    from llmkit.cli.remote import act
    from llmkit.system.text import printable

    done = act(base_url, api_key, what, {"model": model, **more})
    if json:
        _print_json(done)
    else:
        print(f"{what}ed {printable(str(done.get('id', model)))}")
    return 0
