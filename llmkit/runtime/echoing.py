"""One answer of an `EchoEngine`, written a token at a time. The echo's thread only."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmkit.engine.detokenize import ResumedDetokenizer
from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    GenerationRequest,
    RequestMetrics,
    RunningRequest,
    TokenLogprob,
    Usage,
)
from llmkit.protocol.stream import Channel
from llmkit.runtime.echotext import piece, tokenize

__all__ = ["EchoAnswer"]


class EchoAnswer:
    """The answer ``text`` to a request, of at most ``room`` tokens."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        text: str,
        room: int,
        abort: Callable[[str], None],
    ) -> None:
        self.request, self.prompt = request, prompt
        self.channel = Channel(request.request_id, abort)
        self.is_aborted = False
        wanted = request.sampling.max_tokens
        self._tokens = tokenize(text)
        self._limit = room if wanted is None else min(wanted, room)
        begun = request.resume
        done = begun.tokens if begun is not None else ()
        if done != tuple(self._tokens[: min(len(done), self._limit)]):
            raise InvalidRequestError("resume: the echo would not answer that.", "resume")
        sent = begun.sent_chars if begun is not None else 0
        self._detokenizer = ResumedDetokenizer(piece, request.sampling.stop, sent)
        self._unsent = "".join(map(self._detokenizer.push, done))
        if self._detokenizer.num_missing:
            raise InvalidRequestError("sent_chars: the tokens have less text.", "sent_chars")
        self._done = self._resumed = len(done)
        self._arrived = self._begun = self._first = self._last = time.perf_counter()
        self._max_gap = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._done

    def begin(self) -> None:
        """It is its turn."""
        self._begun = time.perf_counter()

    def step(self) -> bool:
        """Write one token. Returns whether it was the last one."""
        if self.is_aborted:
            return self._finish(FinishReason.ABORT)
        if self._detokenizer.stopped or self._done >= min(self._limit, len(self._tokens)):
            rest = self._unsent + self._detokenizer.flush()
            if rest:
                self.channel.push(Delta(rest, 0))
            return self._finish(
                FinishReason.STOP if self._detokenizer.stopped else self._natural_end
            )
        token = self._tokens[self._done]
        text, self._unsent = self._unsent + self._detokenizer.push(token), ""
        now, is_first = time.perf_counter(), self._done == self._resumed
        self._first = now if is_first else self._first
        self._max_gap = 0.0 if is_first else max(self._max_gap, now - self._last)
        self._last = now
        self._done += 1
        is_last = self._done >= min(self._limit, len(self._tokens))
        if is_last:
            text += self._detokenizer.flush()
        shown = (token,) if self.request.show_tokens else ()
        self.channel.push(Delta(text, 1, self._logprobs([token]), shown))
        if self._detokenizer.stopped:
            return self._finish(FinishReason.STOP)
        return self._finish(self._natural_end) if is_last else False

    @property
    def _natural_end(self) -> FinishReason:
        return FinishReason.STOP if self._limit >= len(self._tokens) else FinishReason.LENGTH

    def _logprobs(self, tokens: list[int]) -> tuple[TokenLogprob, ...]:
        """There is no choice, so each token is certain."""
        wanted = self.request.sampling.logprobs
        if wanted is None:
            return ()
        return tuple(
            TokenLogprob(t, piece(t), 0.0, ((t, piece(t), 0.0),) if wanted else ()) for t in tokens
        )

    def _finish(self, reason: FinishReason) -> bool:
        tokens = self._tokens[: self._done]
        self.channel.finish(
            Completion(
                "".join(self.channel.text_parts),
                reason,
                Usage(len(self.prompt), self._done),
                RequestMetrics(
                    queue_s=self._begun - self._arrived,
                    ttft_s=self._first - self._arrived,
                    decode_s=self._last - self._first,
                    max_itl_s=self._max_gap,
                    prompt_tokens=len(self.prompt),
                    completion_tokens=self._done - self._resumed,
                ),
                tuple(tokens),
                self.request.request_id,
                logprobs=self._logprobs(tokens[self._resumed :]),
                prompt_logprobs=self._prompt_logprobs(),
                stop=self._detokenizer.matched,
            )
        )
        return True

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        if self.request.sampling.prompt_logprobs is None:
            return ()
        return tuple(
            TokenLogprob(token, piece(token), 0.0 if i else None)
            for i, token in enumerate(self.prompt)
        )

    def as_running(self, slot: int) -> RunningRequest:
        """What is known of it while it runs."""
        return RunningRequest(
            self.request.request_id,
            self.request.caller,
            slot,
            len(self.prompt),
            0,
            self._done,
            time.perf_counter() - self._arrived,
        )
