"""Takes in the beginning of an answer that another engine generated. Before the request is
submitted, so on any thread; runs no model.

What these tokens meant there they mean here: text held back, stop strings, loops and limits. The
sampler and the grammar are the runner's own and are told by whoever makes them.
"""

from __future__ import annotations

from collections.abc import Callable

from llmkit.engine.detokenize import ResumedDetokenizer
from llmkit.engine.request import Request
from llmkit.errors import InvalidRequestError
from llmkit.protocol import FinishReason, Resume

__all__ = ["resume"]


def resume(
    request: Request,
    begun: Resume,
    *,
    is_end: Callable[[int], bool],
    n_vocab: int,
    n_ctx: int,
    context_shift: bool,
) -> None:
    """Give ``request``, which must have a `ResumedDetokenizer`, the output in ``begun``.

    It is finished if that is the whole answer, unless its prompt is to be scored. Raises
    `InvalidRequestError` if no engine of these options can have generated it.
    """
    if len(begun.tokens) > request.max_tokens:
        raise InvalidRequestError(
            f"resume: {len(begun.tokens)} tokens are more than the answer may have "
            f"({request.max_tokens}).",
            "resume",
        )
    reason: FinishReason | None = None
    for i, token in enumerate(begun.tokens):
        if not 0 <= token < n_vocab:
            raise InvalidRequestError(
                f"resume: token id {token} is out of range (0–{n_vocab - 1}).", "resume"
            )
        if reason is not None:
            raise InvalidRequestError(
                f"resume: the answer ended after {i} of these {len(begun.tokens)} tokens.", "resume"
            )
        if is_end(token) and not request.sampling.ignore_eos:
            reason = FinishReason.STOP
            continue
        request.append(token, 0.0)
        reason = _ending(request, None if context_shift else n_ctx)
        if reason is None and len(request.tokens) >= n_ctx:
            raise InvalidRequestError(
                "resume: the answer has filled its context, which was shifted; such an answer "
                "cannot be resumed.",
                "resume",
            )
    request.resume()
    reader = request.detokenizer
    if isinstance(reader, ResumedDetokenizer) and reader.num_missing:
        raise InvalidRequestError(
            f"sent_chars: {begun.sent_chars} is more than the text of the tokens has; "
            f"at most {begun.sent_chars - reader.num_missing} can have been sent.",
            "sent_chars",
        )
    if reason is not None and request.scores_prompt:
        request.ended_as, request.max_tokens = reason, 0  # computed, and nothing generated
    elif reason is not None:
        request.finish(reason)


def _ending(request: Request, n_ctx: int | None) -> FinishReason | None:
    """Why it ends with its newest token, as `Intake` decides; ``n_ctx`` if a full context ends."""
    if request.detokenizer.stopped:
        return FinishReason.STOP
    if request.is_repeating:
        return FinishReason.REPETITION
    is_full = n_ctx is not None and len(request.tokens) >= n_ctx
    if request.num_output_tokens >= request.max_tokens or is_full:
        return FinishReason.LENGTH
    return None
