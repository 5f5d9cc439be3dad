"""`llmkit.compare`: loads models one after another and compares speed, memory and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench import plots, quality
from llmkit.errors import InvalidRequestError
from llmkit.models.registry import resolve
from llmkit.protocol import TokenLogprob
from llmkit.runtime.loaded import loaded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from llmkit.llm import LLM

__all__ = ["Comparison", "compare_models"]


def compare_models(
    load: Callable[..., LLM],
    names: Sequence[str | Path],
    text: str | None,
    batch_size: int,
    prompt_tokens: int,
    n_ctx: int,
    options: dict[str, Any],
) -> Comparison:
    """Implements `llmkit.compare`; ``load`` is `llmkit.load`."""
    if isinstance(names, str | Path) or not names:
        raise InvalidRequestError("compare takes a list of models.", "names")
    # Now, to report a bad name before an hour of measuring.
    paths = [resolve(name).path for name in names]
    for path in paths:
        _known(path)
    rows: list[dict[str, Any]] = []
    reference: list[TokenLogprob] | None = None
    for name, path in zip(names, paths, strict=True):
        llm = _known(path)
        stays = llm is not None
        llm = llm or load(
            name, **{"n_ctx": n_ctx, "n_slots": max(batch_size, 1), "share": False, **options}
        )
        try:
            scored = quality.scores(llm.engine, llm.tokenize(text or quality.SAMPLE_TEXT), top=1)
            reference = reference or scored
            rows.append(
                {
                    "model": str(name),
                    **_measure(llm, min(batch_size, llm.model.n_slots), prompt_tokens),
                    **_judge(scored, reference),
                }
            )
        finally:
            if not stays:
                llm.unload()
    return Comparison(rows)


def _known(path: Path) -> LLM | None:
    """The handle of a file that is loaded here, whatever was made of it (``quantize=``).

    Raises `InvalidRequestError` for one that writes no text.
    """
    known = loaded.of(path)
    if known is None or known.closed:
        living = loaded.living().values()
        known = next((m for m in living if Path(m.model.path) == path), None)
    if known is not None and known.model.use != "generate":
        raise InvalidRequestError(
            f"{known.name!r} does not write; compare takes models that do.", "names"
        )
    return known  # type: ignore[no-any-return]


def _measure(llm: LLM, batch_size: int, prompt_tokens: int) -> dict[str, Any]:
    d = llm.model
    summary = (
        llm.profile(
            prompt_tokens=(min(prompt_tokens, d.n_ctx - 40),),
            batch_sizes=(1, batch_size),
            max_tokens=32,
        )
        .summary()
        .set_index("batch_size")
    )
    alone, together = summary.iloc[0], summary.iloc[-1]
    return {
        "quantization": d.quantization,
        "weights_mb": d.weights_bytes / 1e6,
        "kv_mb": d.kv_bytes / 1e6,
        "ttft_s": alone["ttft_p50_s"],
        "prefill_tok_s": alone["prefill_tok_s"],
        "decode_tok_s": alone["decode_tok_s"],
        "batch_tok_s": together["decode_tok_s"],
    }


def _judge(scored: Sequence[TokenLogprob], reference: Sequence[TokenLogprob]) -> dict[str, Any]:
    import math

    known = {"perplexity": math.exp(-sum(e.logprob or 0.0 for e in scored) / len(scored))}
    if [e.token for e in scored] != [e.token for e in reference]:  # another vocabulary
        return {**known, "agreement": math.nan}
    same = sum(a.top[0][0] == b.top[0][0] for a, b in zip(scored, reference, strict=True))
    return {**known, "agreement": same / len(scored)}


class Comparison:
    """Models side by side.

    ``df``: one row per model; sizes in MB, rates in tokens per second, ``agreement`` with the first
    model from 0 to 1. ``plot()``: a chart of speed and quality.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    @property
    def df(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self._rows).set_index("model")

    def plot(self) -> Axes:
        """Decode speed, memory and perplexity, one bar per model. Returns the last panel's Axes."""
        return plots.comparison(self.df)

    def __repr__(self) -> str:
        return self.df.round(3).to_string()

    def _repr_html_(self) -> str:
        return str(self.df.round(3).to_html())
