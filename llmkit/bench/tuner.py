"""`llmkit.tune()`: the settings and quantization that make a model fastest on this machine.

Takes about half a minute for a small model.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.quality import SAMPLE_TEXT
from llmkit.errors import EngineError, LLMKitError
from llmkit.models import gguf
from llmkit.models.marks import result_file
from llmkit.models.registry import ModelSpec, resolve
from llmkit.runtime.quantizing import quantized

if TYPE_CHECKING:
    import pandas as pd

    from llmkit.backend.llama import LlamaRunner
    from llmkit.backend.model import LlamaModel

__all__ = ["Tuning", "tune", "tuned"]

PROMPT_TOKENS, STREAMS, STEPS = 256, 8, 12
OUTPUT_TOKENS = 128
WORTH = 1.1  # how many times faster a setting must be to replace the defaults
# Types with slow CPU kernels in llama.cpp, and their replacements: Q8_0 loses next to nothing,
# Q4_0 is smaller and coarser.
SLOW_TYPES = ("Q4_1", "Q5_0", "Q5_1")
FAST_TYPES = ("Q8_0", "Q4_0")
# Share of equal top tokens that a prepared file needs to be chosen: below 1, since near ties may
# flip without any loss.
MIN_AGREEMENT = 0.9


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to run the model, with its speeds in tokens per second.

    Prefill, decoding one stream and eight, and a load of eight clients (256 tokens in, 128 out).
    """

    label: str
    options: dict[str, Any]
    file: str
    prefill_tok_s: float
    decode_tok_s: float
    decode8_tok_s: float
    agreement: float = 1.0

    @property
    def load_tok_s(self) -> float:
        seconds = (
            STREAMS * PROMPT_TOKENS / self.prefill_tok_s
            + STREAMS * OUTPUT_TOKENS / self.decode8_tok_s
        )
        return STREAMS * OUTPUT_TOKENS / seconds


class Tuning:
    """What `llmkit.tune()` found; `llmkit.load(model, tuned=True)` uses it.

    ``df`` has every trial, ``options`` the options for `load`, ``file`` the prepared file if
    another quantization is much faster. ``agreement`` is the share of a text's tokens for which a
    prepared file has the same top token as the model; below 90 % it is shown, but not chosen.

    Speeds are relative to the ``baseline``: the defaults, or the first trial where they do not run.
    """

    def __init__(self, model: str, trials: list[Trial]) -> None:
        self.model, self.trials = model, trials
        self._faithful = [t for t in trials if t.agreement >= MIN_AGREEMENT] or trials[:1]
        self.baseline = self._faithful[0]

    @property
    def best(self) -> Trial:
        """The fastest trial; the baseline, unless another is at least 1.1 times as fast."""
        return max(
            self._faithful, key=lambda t: t.load_tok_s / (1 if t is self.baseline else WORTH)
        )

    @property
    def options(self) -> dict[str, Any]:
        """The best trial's options for `load`."""
        return dict(self.best.options)

    @property
    def file(self) -> Path:
        """The best trial's file."""
        return Path(self.best.file)

    @property
    def speedup(self) -> float:
        """Throughput with eight clients, relative to the baseline."""
        return self.best.load_tok_s / self.baseline.load_tok_s

    @property
    def df(self) -> pd.DataFrame:
        """One row per trial, rates in tokens per second; ``ratio`` to the baseline."""
        import pandas as pd

        base = self.baseline.load_tok_s
        columns = [
            {
                "setting": t.label,
                **{n: getattr(t, n) for n in RATES},
                "ratio": t.load_tok_s / base,
                "agreement": t.agreement,
            }
            for t in self.trials
        ]
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        best, base = self.best, self.baseline
        ran = base.label == DEFAULTS
        if best is base and ran:
            verdict = "the defaults are best here"
        else:
            verdict = f"best: {best.label}"
            if best is not base:
                name = "the defaults" if ran else base.label
                verdict += f", {self.speedup:.2f}x {name} with eight clients"
            verdict += f"; llmkit.load({self.model!r}, tuned=True) uses it"
            if not ran:
                verdict += "; the defaults do not run here"
            if best.file != base.file:
                verdict += f" (the prepared file agrees on {best.agreement:.0%} of the tokens)"
        return f"Tuning({self.model!r}: {verdict})\n{self.df.round(2).to_string(index=False)}"

    def _repr_html_(self) -> str:
        import html

        verdict = html.escape(repr(self).splitlines()[0])
        return f"<p>{verdict}</p>{self.df.round(2).to_html(index=False)}"


DEFAULTS = "defaults"
RATES = ("prefill_tok_s", "decode_tok_s", "decode8_tok_s", "load_tok_s")


def tune(model: str | Path = "smollm2", *, prepare: bool = True) -> Tuning:
    """Measure thread counts, flash attention, the KV cache's type and layout, and step sizes.

    ``prepare`` also tries the model in Q8_0 and Q4_0 if its own type is known to be slow on CPUs.

    The result is saved for this machine and model. Raises what `load` raises for an invalid file,
    and `EngineError` when nothing runs here. ■ stops it; nothing is saved then.
    """
    from llmkit.backend.library import num_threads

    spec = resolve(model)
    info = gguf.read_header(spec.path)
    cores = num_threads()
    candidates: list[tuple[str, dict[str, Any]]] = [(DEFAULTS, {})]
    candidates += [
        (f"threads={n}", {"threads": n})
        for n in sorted({max(1, cores - 1), max(1, cores // 2)} - {cores}, reverse=True)
    ]
    candidates += [
        ("flash_attention=True", {"flash_attention": True}),
        ("flash_attention=False", {"flash_attention": False}),
    ]
    candidates += [
        ("kv_unified=True", {"kv_unified": True}),
        ("kv_type='q8_0'", {"kv_type": "q8_0"}),
    ]
    candidates += [(f"batch_tokens={n}", {"batch_tokens": n}) for n in (128, 256)]
    trials = [
        replace(t, agreement=_agreement(spec.path, spec.path, **t.options))
        if "kv_type" in t.options
        else t
        for t in _measure(spec.path, candidates)
    ]
    if prepare and info.quantization in SLOW_TYPES:
        best = Tuning(str(model), trials).best
        for kind in FAST_TYPES:
            file = quantized(spec, kind, upward=True).path
            agreement = _agreement(spec.path, file, **best.options)
            label = f"{best.label}, {kind}" if best.options else kind
            with contextlib.suppress(EngineError):  # what does not run is not chosen
                trials += [
                    replace(t, agreement=agreement) for t in _measure(file, [(label, best.options)])
                ]
    tuning = Tuning(str(model), trials)
    _save(spec, tuning)
    return tuning


def tuned(spec: ModelSpec) -> tuple[Path, dict[str, Any]] | None:
    """The file and options that `tune` found best for this machine and model.

    None when it was not run, or the file is gone.
    """
    try:
        data = json.loads(_result_file(spec).read_text())
        file = Path(data["file"])
        return (file, data["options"]) if file.exists() else None
    except (OSError, ValueError, KeyError):
        return None


def _result_file(spec: ModelSpec) -> Path:
    from llmkit.backend.library import num_threads

    return result_file(spec, num_threads())


def _save(spec: ModelSpec, tuning: Tuning) -> None:
    target = _result_file(spec)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        json.dumps(
            {
                "file": tuning.best.file,
                "options": tuning.options,
                "speedup": tuning.speedup,
                "at": int(time.time()),
            }
        )
    )


def _runner(
    model: LlamaModel, n_slots: int, batch_tokens: int = 512, **options: Any
) -> LlamaRunner:
    from llmkit.backend.llama import LlamaRunner

    return LlamaRunner(model, n_ctx=512, n_slots=n_slots, max_batch_tokens=batch_tokens, **options)


def _measure(path: Path, candidates: list[tuple[str, dict[str, Any]]]) -> Iterator[Trial]:
    """The trials of the candidates that run here. Raises `EngineError` if none does."""
    from llmkit.backend.model import LlamaModel

    model = LlamaModel(path)
    num_run = 0
    failure: Exception | None = None
    try:
        for label, options in candidates:
            try:
                runner = _runner(model, STREAMS, **options)
            except LLMKitError as error:  # not supported by this model or device
                failure = failure or error
                continue
            try:
                if not num_run:
                    _time(runner)  # warm-up: the very first run is slow
                trial = _time(runner)
            except (LLMKitError, RuntimeError) as error:  # llama.cpp gave up
                failure = failure or error
                continue
            finally:
                runner.close()
            num_run += 1
            yield replace(trial, label=label, options=options, file=str(path))
    finally:
        model.close()
    if not num_run:
        raise EngineError(f"{path.name} could not be measured here: {failure}") from failure


def _time(runner: Any) -> Trial:
    from llmkit.engine.batch import Batch, Chunk, Truncate

    def seconds(batch: Batch, times: int) -> float:
        """The median over ``times`` runs of the same step."""
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            runner.execute(batch)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[times // 2]

    prompt = [1 + i % 200 for i in range(PROMPT_TOKENS)]
    runner.execute(Batch((Chunk(0, 0, prompt[:8], False),)))
    size = min(runner.max_batch_tokens, PROMPT_TOKENS)
    prefill = sum(
        seconds(Batch((Chunk(0, at, prompt[at : at + size], False),), (Truncate(0, at),)), 3)
        for at in range(0, PROMPT_TOKENS, size)
    )
    for s in range(STREAMS):
        runner.execute(Batch((Chunk(s, 0, prompt[:64], False),), (Truncate(s, 0),)))
    back = tuple(Truncate(s, 64) for s in range(STREAMS))
    one = seconds(Batch((Chunk(0, 64, [5], True),), back), STEPS)
    many = seconds(Batch(tuple(Chunk(s, 64, [5], True) for s in range(STREAMS)), back), STEPS)
    return Trial("", {}, "", PROMPT_TOKENS / prefill, 1 / one, STREAMS / many)


def _agreement(first: Path, second: Path, **options: Any) -> float:
    """The share of a text's positions at which both models have the same top token.

    The second is loaded with ``options``.
    """
    from llmkit.backend.model import LlamaModel

    top_tokens = []
    for path, settings in ((first, {}), (second, options)):
        model = LlamaModel(path)
        try:
            runner = _runner(model, 1, **settings)
            try:
                top_tokens.append(
                    runner.logits(model.vocab.tokenize(SAMPLE_TEXT)[:500]).argmax(axis=1)
                )
            finally:
                runner.close()
        finally:
            model.close()
    return float((top_tokens[0] == top_tokens[1]).mean())
