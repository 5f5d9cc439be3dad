"""`load` and `estimate`: a name becomes the handle people hold. One file is one engine in a process."""

from __future__ import annotations

import difflib
import itertools
import os
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit import models
from llmkit.errors import InvalidRequestError, ModelNotFoundError
from llmkit.llm import LLM
from llmkit.notebook.progress import Progress
from llmkit.options import EngineOptions
from llmkit.running import Interrupted

if TYPE_CHECKING:
    from llmkit.models.memory import MemoryEstimate
    from llmkit.models.registry import ModelSpec

__all__ = ["attach", "estimate", "kernel_id", "load"]

_loaded: dict[Path, LLM] = {}
_load_lock = threading.RLock()


def _forget_the_parents_models() -> None:
    """In a forked child: its engines have no threads here, and the lock may be held by a thread that is none of ours."""
    global _load_lock
    _load_lock = threading.RLock()
    _loaded.clear()
    models.handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parents_models)


def load(
    model: str | Path = "smollm2",
    *,
    n_ctx: int | None = None,
    n_slots: int | None = None,
    n_gpu_layers: int | Literal["auto"] = "auto",
    threads: int | None = None,
    name: str | None = None,
    share: bool | None = None,
    force: bool = False,
    tuned: bool = False,
    **options: Any,
) -> LLM:
    """Load a GGUF model into this process.

    ``model`` is an alias ("smollm2") or a path. ``n_ctx`` is the most tokens one request may have (prompt and answer), ``n_slots`` the number of requests
    computed at once; None chooses both (4096 at most, 8 at most, by memory). ``n_gpu_layers="auto"`` puts as many layers on the GPU as fit there, -1 all,
    0 none. ``threads=None`` takes all cores this process may use. ``share=False`` keeps the model from the gateway and from
    other processes of this user, which else can reach it. The same
    file loads once: a second call gives the same engine. ``tuned=True`` takes what `llmkit.tune` found best here.

    ``options``, seldom needed:

    - ``target_itl_ms=500``: prompts of others stretch the time between two tokens of a stream to no more than this, if the machine can do it at all.
    - ``kv_unified=True``: one KV buffer for all requests, of ``kv_tokens`` tokens in all (default: n_ctx x n_slots), instead of one each; requests that do
      not fit any more wait and come back.
    - ``kv_type="f16"``, "q8_0" or "q4_0"; ``flash_attention=None`` (llama.cpp decides), True or False; ``rope_scaling=2.0`` stretches positions.
    - ``host_cache_mb=512``: room outside the context for prefixes that lost their slot. ``prefix_dir``: a folder where prefixes outlive the process, at most
      ``disk_cache_mb=4096`` of them.
    - ``lora``: the path of an adapter, a list of them, or a dict of paths and scales; requests choose others with ``lora={"name": scale}``.
    - ``draft``: a smaller model of the same vocabulary (a name as for ``model``) that guesses tokens; the model checks them, so the text stays its own.
    - ``context_shift=True``: a request that fills its context goes on without the older half of what followed its prompt, up to its ``max_tokens``.
    - ``isolated=True``: the model lives in a process of its own, ended with this one: a crash of the model is an error here and no dead kernel.
    - ``deterministic=True``: the same request gives the same tokens whatever runs beside it or is cached; slower.
    - ``share_prefixes=True``: cached beginnings of prompts are shared by all callers. By default each caller has its own, since ``cached_tokens`` and the time
      to the first token tell whether somebody has asked the same before.
    - ``max_waiting=1024``: requests that may wait. ``batch_tokens=512``: tokens computed in one step.

    Raises `ModelNotFoundError`, `InvalidModelFileError`, `InsufficientMemoryError` (``force=True`` skips the estimate), `ModelLoadError`, and
    `InvalidRequestError` for impossible options.
    """
    from llmkit.models.registry import resolve

    spec = resolve(model)
    if tuned:
        spec, best = _tuned(spec)
        measured = best.pop("threads", None)
        threads = threads or measured
        if options.get("context_shift") or options.get("deterministic"):
            best.pop("kv_unified", None)  # what was asked goes before what is fast
        options = {**best, **options}
    named = {"n_ctx": n_ctx, "n_slots": n_slots, "threads": threads, **({"n_gpu_layers": n_gpu_layers} if n_gpu_layers != "auto" else {})}
    given = {k for k, v in {**named, **options}.items() if v is not None}
    settings = _options(n_ctx=n_ctx, n_slots=n_slots, n_gpu_layers=n_gpu_layers, threads=threads, **options)
    try:
        with _load_lock:
            return _open(spec, settings, given, name, force, share)
    except KeyboardInterrupt:
        raise Interrupted("loading was stopped; nothing of it stays in memory") from None


def _open(spec: ModelSpec, settings: EngineOptions, given: set[str], name: str | None, force: bool, share: bool | None) -> LLM:
    """The model of a file, loaded already or now; the lock is held."""
    from llmkit.local import open_model

    _register_displays()
    loaded = _loaded.get(spec.path)
    if loaded is not None and not loaded.closed:
        loaded.check_same(settings, name, given, share)
        if share:
            loaded.share(kernel_id())
        return loaded
    if loaded is not None:
        loaded.unload()  # its process or its engine has ended
    name = name or _free_name(spec.name)
    if settings.isolated:
        from llmkit.isolated import IsolatedEngine

        isolated = IsolatedEngine(spec, settings, name=name, force=force, kernel_id=kernel_id(), share=share is not False)
        return _remember(spec.path, LLM(isolated, None, settings, _forget))
    progress = Progress(f"loading {spec.name}", 1.0, keep=False)
    try:
        engine = open_model(spec, settings, name=name, force=force, on_progress=progress.update)
    except BaseException:
        progress.close(finished=False)
        raise
    bridge = None
    try:
        progress.close()
        if share is not False:
            from llmkit.bridge.server import BridgeServer

            bridge = BridgeServer(engine, kernel_id())
        return _remember(spec.path, LLM(engine, bridge, settings, _forget))
    except BaseException:  # the stop button too: an engine that nobody holds could never be unloaded
        if bridge is not None:
            bridge.close()
        engine.close()
        raise


def _free_name(stem: str) -> str | None:
    """Another name where a model of another file is called so already; None where the file's own will do."""
    taken = {loaded.name for loaded in _loaded.values() if not loaded.closed}
    return None if stem not in taken else next(name for i in itertools.count(2) if (name := f"{stem}-{i}") not in taken)


def _remember(path: Path, llm: LLM) -> LLM:
    _loaded[path] = llm
    models.handles.pop(llm.name, None)
    models.handles[llm.name] = llm
    return llm


def attach(model: str | None = None) -> LLM:
    """A model that another process of this user has loaded (another notebook, ``llmkit serve``): no memory is taken for it here.

    ``model`` is its name, or ``name@kernel``; None takes the newest. ``unload()`` lets go and leaves the model where it is. Raises `ModelNotFoundError`.
    """
    from llmkit.bridge.client import BridgeClient
    from llmkit.bridge.connection import find_connections

    found = [c for c in find_connections() if c.pid != os.getpid()]
    for connection in found:
        if model in (None, connection.model.name, f"{connection.model.name}@{connection.kernel_name}"):
            _register_displays()
            attached = LLM(BridgeClient(connection), on_unload=_forget)
            models.living().setdefault(attached.name, attached)
            return attached
    names = ", ".join(repr(f"{c.model.name}@{c.kernel_name}") for c in found) or "none at all"
    what = "no model" if model is None else f"no model {model!r}"
    raise ModelNotFoundError(f"{what} is loaded in another process of yours on this machine; there: {names}. llmkit.load() loads one here.")


def _forget(llm: LLM) -> None:
    with _load_lock:
        for path, loaded in list(_loaded.items()):
            if loaded is llm:
                del _loaded[path]
        if models.handles.get(llm.name) is llm:
            del models.handles[llm.name]


def estimate(model: str | Path = "smollm2", **options: Any) -> MemoryEstimate:
    """What `load` with these options would take, from the file's header alone; loads nothing. Raises what `load` raises for a file that is none and for
    impossible options. A draft model is not in it."""
    from llmkit import assembly
    from llmkit.models import gguf
    from llmkit.models.registry import resolve

    return assembly.estimate(gguf.read_header(resolve(model).path), _options(**options))


def _tuned(spec: ModelSpec) -> tuple[ModelSpec, dict[str, Any]]:
    from llmkit.bench import tuner

    found = tuner.tuned(spec)
    if found is None:
        raise InvalidRequestError(f"{spec.name!r} was not tuned on this machine yet; run llmkit.tune({spec.name!r}) once.", "tuned")
    return replace(spec, path=found[0]), dict(found[1])


def _options(**options: Any) -> EngineOptions:
    unknown = set(options) - {f.name for f in fields(EngineOptions)}
    if unknown:
        near = difflib.get_close_matches(min(unknown), [f.name for f in fields(EngineOptions)], n=1)
        raise TypeError(f"load() got an unexpected option {min(unknown)!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return EngineOptions(**options)


def kernel_id() -> str | None:
    """The id of the Jupyter kernel that this is, None elsewhere. Never imports ipykernel."""
    import sys

    if "ipykernel.kernelapp" not in sys.modules:
        return None
    from ipykernel.kernelapp import IPKernelApp  # type: ignore[import-untyped,unused-ignore]

    if not IPKernelApp.initialized():
        return None
    stem = Path(IPKernelApp.instance().connection_file).stem
    return stem.removeprefix("kernel-") if stem.startswith("kernel-") else None


def _register_displays() -> None:
    import sys

    if "IPython" in sys.modules:
        from llmkit.notebook import display

        display.register()
