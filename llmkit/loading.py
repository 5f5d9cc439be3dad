"""`load` and what else takes the name of a model. A file is loaded at most once per process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

from llmkit import models
from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.notebook.progress import Progress, shown_download
from llmkit.runtime.loaded import loaded
from llmkit.sessions.running import Interrupted
from llmkit.settings.options import OPTIONS, EngineOptions
from llmkit.settings.table import document
from llmkit.system.process import kernel_id
from llmkit.wanted import engine_options, resolved, with_tuning

if TYPE_CHECKING:
    from llmkit.bench.comparing import Comparison
    from llmkit.drawing import TextToImage
    from llmkit.llm import LLM
    from llmkit.models.memory import MemoryEstimate
    from llmkit.models.registry import ModelSpec
    from llmkit.protocol.client import EngineClient
    from llmkit.sound import SpeechToText, TextToSpeech

    Handle: TypeAlias = LLM | SpeechToText | TextToSpeech | TextToImage

__all__ = ["attach", "compare", "download", "estimate", "load", "quantize"]

models.show(loaded)


@overload
def load(
    model: Literal["whisper-tiny.en"],
    *,
    name: str | None = None,
    share: bool | None = None,
    **options: Any,
) -> SpeechToText: ...
@overload
def load(
    model: Literal["hibari"],
    *,
    name: str | None = None,
    share: bool | None = None,
    **options: Any,
) -> TextToSpeech: ...
@overload
def load(
    model: str | Path = "smollm2",
    *,
    name: str | None = None,
    share: bool | None = None,
    force: bool = False,
    tuned: bool = False,
    **options: Any,
) -> LLM: ...
def load(
    model: str | Path = "smollm2",
    *,
    name: str | None = None,
    share: bool | None = None,
    force: bool = False,
    tuned: bool = False,
    **options: Any,
) -> Any:
    """Load a GGUF model into this process; one that hears, speaks or draws is a `SpeechToText`, a
    `TextToSpeech` or a `TextToImage`.

    A file is loaded once: a second call returns the same model. The stop button ends a load.

    model: an alias ("smollm2"), a path, a name in ``$LLMKIT_MODELS_DIR``, or on the Hugging Face
        Hub ``org/repo:file.gguf`` or ``org/repo:Q4_K_M``, downloaded once.
    name: model name for callers; by default the file's name.
    share: False hides it from the gateway and your other processes, which can otherwise use it.
    force: load a model even if it is not expected to fit into memory.
    tuned: use the settings that `llmkit.tune` found on this machine.

    {options}

    Raises `ModelNotFoundError`, `InvalidModelFileError`, `InsufficientMemoryError`,
    `ModelLoadError`, and `InvalidRequestError` for invalid options.
    """
    spec = resolved(model)
    if tuned:
        spec, options = with_tuning(spec, options)
    options = {k: v for k, v in options.items() if v is not None}
    given = {k for k, v in options.items() if (k, v) != ("n_gpu_layers", "auto")}
    settings = engine_options(**options)
    try:
        with loaded.turn(spec.path):
            return _open(spec, settings, given, name, force, share)
    except KeyboardInterrupt:
        raise Interrupted("loading was stopped; nothing stays in memory") from None


document(load, OPTIONS, EngineOptions.__annotations__)


def _open(
    spec: ModelSpec,
    settings: EngineOptions,
    given: set[str],
    name: str | None,
    force: bool,
    share: bool | None,
) -> Handle:
    """The model of a file, loaded if necessary. The file's turn is held."""
    _register_displays()
    known: Handle | None = loaded.of(spec.path)
    if known is not None and not known.closed:
        known.check_same(settings, name, given, share)
        if share:
            known.share(kernel_id())
        return known
    if known is not None:
        known.unload()  # its process or engine has ended
    if name is not None:
        return _load(spec, settings, name, force, share)
    claimed = loaded.claim(spec.name)
    try:
        return _load(spec, settings, claimed, force, share)
    finally:
        loaded.release(claimed)


def _load(
    spec: ModelSpec, settings: EngineOptions, name: str, force: bool, share: bool | None
) -> Handle:
    from llmkit.runtime.opening import open_model

    def meanwhile() -> None:
        import llmkit.bridge.server
        import llmkit.llm  # noqa: F401

    if settings.isolated:
        meanwhile()
    progress = Progress(f"loading {spec.name}", 1.0, keep=False)
    engine: EngineClient
    try:
        if settings.isolated:
            from llmkit.workers import isolated

            more: dict[str, Any] = {"kernel_id": kernel_id(), "share": share is not False}
            engine = isolated.start(
                spec, settings, name=name, force=force, on_progress=progress.update, **more
            )
        else:
            engine = open_model(
                spec,
                settings,
                name=name,
                force=force,
                on_progress=progress.update,
                meanwhile=meanwhile,
            )
    except BaseException:
        progress.close(finished=False)
        raise
    bridge = None
    try:
        progress.close()
        if share is not False and not settings.isolated:
            from llmkit.bridge.server import BridgeServer

            bridge = BridgeServer(engine, kernel_id())
        return _remember(spec.path, _handle_of(engine)(engine, bridge, settings, loaded.forget))
    # The stop button too: an engine without a handle could never be unloaded.
    except BaseException:
        if bridge is not None:
            bridge.close()
        engine.close()
        raise


def _remember(path: Path, handle: Handle) -> Handle:
    loaded.add(path, handle)
    return handle


def _handle_of(engine: EngineClient) -> type[LLM | SpeechToText | TextToSpeech | TextToImage]:
    """What people hold, by what the model does."""
    if engine.description.use == "draw":
        from llmkit.drawing import TextToImage

        return TextToImage
    if engine.description.use in ("hear", "speak"):
        from llmkit.sound import SpeechToText, TextToSpeech

        return SpeechToText if engine.description.hears else TextToSpeech
    from llmkit.llm import LLM

    return LLM


def download(name: str, *, models_dir: str | Path | None = None, mmproj: bool = False) -> Path:
    """Download a model of the Hugging Face Hub; returns its file, of a split one the first.

    name: ``org/repo:file.gguf``, ``org/repo:Q4_K_M`` (the file with that type of weights), or
        ``org/repo`` (a usual type). With ``org/repo@revision`` at a branch, tag or commit.
    models_dir: the folder to put it in, as ``org/repo/file.gguf``; by default it goes to Hugging
        Face's cache ($HF_HOME).
    mmproj: also fetch the file that reads pictures.

    What was interrupted goes on where it stopped, and the checksum is compared. Raises
    `InvalidRequestError`, `ModelNotFoundError`, and `DownloadError` (disk, network, checksum, no
    GGUF file).
    """
    from llmkit.models.download import download as fetch

    folder = None if models_dir is None else Path(models_dir)
    with shown_download(name) as on_event:
        return fetch(name, models_dir=folder, mmproj=mmproj, on_event=on_event).path


def quantize(model: str | Path | ModelSpec = "smollm2", kind: str = "Q8_0") -> Path:
    """The model's file with its weights in another type, such as "Q4_K_M" or "Q8_0".

    Made once: kept beside the model, or in llmkit's cache where that folder is not the user's.
    A larger type than the file's restores no precision, and from a quantized file a smaller one
    loses it twice: start from F16 where you can. ■ stops it.

    Raises what `load` raises for an invalid model, `InvalidRequestError` for other types, and
    `ModelLoadError` when there is no room.
    """
    from llmkit.runtime.quantizing import quantized

    spec = resolved(model)
    progress = Progress(f"quantizing {spec.name}", 1.0, keep=False)
    finished = False
    try:
        path = quantized(spec, kind, upward=True, on_progress=progress.update).path
        finished = True
    except KeyboardInterrupt:
        raise Interrupted("quantizing was stopped; no file is left") from None
    finally:
        progress.close(finished=finished)
    return path


def attach(where: str | None = None, *, model: str | None = None, key: str | None = None) -> LLM:
    """Use a model that is loaded elsewhere; it takes no memory here, and needs no llama.cpp.

    where: the name of a model in another of your processes on this machine (another notebook, or
        ``llmkit serve``), or ``name@kernel``; None means the newest. ``"hub"`` is the model of the
        JupyterHub that has started this server, ``"hub:name"`` one of several. A URL such as
        ``"https://example.org/services/llmkit"`` is that of a hub's service or of ``llmkit serve``.
    model: the name of one of several models there.
    key: the key for a URL, by default $LLMKIT_API_KEY; for a hub $JUPYTERHUB_API_TOKEN.

    ``unload()`` only disconnects. Raises `ModelNotFoundError`, for a hub or a URL also
    `EngineGoneError` when nothing answers there and `AccessError` when the key is refused.
    """
    engine: EngineClient
    if where is not None and (where == "hub" or where.startswith("hub:") or "://" in where):
        engine = _remote(where, model, key)
    else:
        if where is not None and model is not None:
            raise InvalidRequestError("give the name of a local model once.", "model")
        engine = _elsewhere(model if where is None else where)
    _register_displays()
    attached: Any = _handle_of(engine)(engine, on_unload=loaded.forget)
    loaded.add(None, attached)
    return cast("LLM", attached)


def _elsewhere(model: str | None) -> EngineClient:
    """The engine of another process of this user on this machine."""
    from llmkit.bridge.client import BridgeClient
    from llmkit.bridge.connection import find_connections

    found = [c for c in find_connections() if c.pid != os.getpid()]
    for connection in found:
        if model in (
            None,
            connection.model.name,
            f"{connection.model.name}@{connection.origin.label}",
        ):
            return BridgeClient(connection)
    names = ", ".join(repr(f"{c.model.name}@{c.origin.label}") for c in found) or "none at all"
    what = "no model" if model is None else f"no model {model!r}"
    raise ModelNotFoundError(
        f"{what} is loaded in another process of yours on this machine; loaded: {names}. "
        "llmkit.load() loads one here."
    )


def _remote(where: str, model: str | None, key: str | None) -> EngineClient:
    """The engine behind a hub's service or another gateway."""
    from llmkit.cluster.address import HUB, KEY, Address, hub_address
    from llmkit.cluster.remote import RemoteEngine

    if where == HUB or where.startswith(f"{HUB}:"):
        named = where.partition(":")[2] or None
        if named is not None and model not in (None, named):
            raise InvalidRequestError("the model is named twice.", "model")
        model, address = named or model, hub_address(os.environ, key)
    else:
        address = Address.of(where, os.environ.get(KEY, "") if key is None else key)
    return RemoteEngine(address, model or "default")


def estimate(model: str | Path = "smollm2", **options: Any) -> MemoryEstimate:
    """The memory that `load` would take with these options, without a draft model; for a model
    that hears, with an hour of sound.

    Reads the file's header only. Raises what `load` raises for invalid files and options.
    """
    from llmkit.models import gguf, memory
    from llmkit.models.image_files import image_model, is_image_model
    from llmkit.models.speech_files import speech_kind
    from llmkit.runtime import assembly, images

    path, settings = resolved(model).path, engine_options(**options)
    if speech_kind(path):
        return memory.speech_estimate(path, settings.n_gpu_layers)
    if is_image_model(path):
        return images.estimate(image_model(path))
    return assembly.estimate(gguf.read_header(path), settings)


def compare(
    names: Sequence[str | Path],
    *,
    text: str | None = None,
    batch_size: int = 4,
    prompt_tokens: int = 256,
    n_ctx: int = 1024,
    **options: Any,
) -> Comparison:
    """Load models one after the other and measure each; those already loaded here stay.

    Measures prefill and decode speed, alone and ``batch_size`` at a time, memory, and perplexity on
    a ``text``. With the same vocabulary also the share of places in it where the likeliest token is
    the first model's. ``options`` are those of `load`. Raises what `load` raises.
    """
    from llmkit.bench.comparing import compare_models

    return compare_models(load, names, text, batch_size, prompt_tokens, n_ctx, options)


def _register_displays() -> None:
    import sys

    if sys.modules.get("IPython") is not None:
        from llmkit.notebook import display

        display.register()
