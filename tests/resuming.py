"""Runs a request whole, and then its rest from every moment at which its engine could have died."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fake_runner import END, FakeRunner

from llmkit.protocol import Completion, Delta, GenerationRequest, Resume
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

_ids = itertools.count()
LINE = "né 👩‍👩‍👧 STOP: ok 🎉 né ".encode()


class Talker(FakeRunner):
    """Writes one line again and again, a byte a token, from wherever its prompt ends."""

    def next_token(self, tokens: list[int], adapters: tuple[tuple[str, float], ...] = ()) -> int:
        return END if len(tokens) >= self.end_after else LINE[len(tokens) % len(LINE)]


def collect(
    stream: Stream, on_text: Callable[[str], object] = lambda _: None
) -> tuple[list[Delta], Completion]:
    """All deltas, and the end, if it is a failure too. ``on_text`` hears all text so far."""
    deltas: list[Delta] = []
    while True:
        new, completion = stream.take()
        deltas += new
        if completion is not None:
            return deltas, completion
        on_text("".join(d.text for d in deltas))
        stream._block(20)


def read(stream: Stream) -> tuple[list[Delta], Completion]:
    """All deltas, and the end."""
    deltas, completion = collect(stream)
    if stream.failure is not None:
        raise stream.failure
    return deltas, completion


def whole(engine: EngineClient, request: GenerationRequest) -> tuple[list[Delta], Completion]:
    """The undisturbed answer, with the ids of its tokens."""
    deltas, done = read(engine.submit(replace(request, show_tokens=True)))
    assert "".join(d.text for d in deltas) == done.text
    return deltas, done


def begun(deltas: Iterable[Delta]) -> Resume:
    """What a reader of these deltas needs to go on."""
    deltas = list(deltas)
    tokens = tuple(t for d in deltas for t in d.tokens)
    assert len(tokens) == sum(d.num_tokens for d in deltas), "a request that can be resumed"
    return Resume(tokens, sum(len(d.text) for d in deltas))


def rest(
    engine: EngineClient, request: GenerationRequest, resume: Resume
) -> tuple[list[Delta], Completion]:
    again = replace(request, request_id=f"again-{next(_ids)}", resume=resume, show_tokens=True)
    return read(engine.submit(again))


def check_cut(
    engine: EngineClient,
    request: GenerationRequest,
    resume: Resume,
    expected: Completion,
) -> None:
    """The rest is what was missing: no character twice, none lost."""
    deltas, done = rest(engine, request, resume)
    sent, k = resume.sent_chars, len(resume.tokens)
    assert done.text == expected.text[sent:], (k, sent)
    assert "".join(d.text for d in deltas) == done.text
    assert done.tokens == expected.tokens
    assert tuple(t for d in deltas for t in d.tokens) == expected.tokens[k:]
    assert (done.finish_reason, done.stop) == (expected.finish_reason, expected.stop)
    assert done.usage.completion_tokens == len(expected.tokens)
    assert done.usage.prompt_tokens == expected.usage.prompt_tokens >= done.usage.cached_tokens
    assert done.metrics.completion_tokens == len(expected.tokens) - k
    assert done.logprobs == expected.logprobs[k:]
    assert done.prompt_logprobs == expected.prompt_logprobs


def check_cuts(
    engine: EngineClient,
    request: GenerationRequest,
    *,
    other: EngineClient | None = None,
    answer: tuple[Sequence[Delta], Completion] | None = None,
    step: int = 1,
) -> Completion:
    """Resume the request after every delta, on the ``other`` engine if there is one."""
    deltas, done = answer or whole(engine, request)
    for k in range(0, len(deltas) + 1, step):
        check_cut(other or engine, request, begun(deltas[:k]), done)
    return done
