"""Fake engines that can be killed, drained and ended, and what is asked of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fake_runner import FakeRunner
from fakes import FakeClient, wait_for

from llmkit.errors import DrainingError, EngineGoneError
from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    EngineState,
    GenerationRequest,
    Inquiry,
    Origin,
    SamplingParams,
)
from llmkit.protocol.stream import Channel, Stream

PROMPT = "Once upon a time"


class Mortal(FakeClient):
    """A fake engine in a process that can be killed, drained, or end with a goodbye."""

    def __init__(self, name: str = "r", *, step_s: float = 0.002, **runner: Any) -> None:
        super().__init__("fake", FakeRunner(step_s=step_s, n_slots=8, **runner))
        self.label, self.phase = name, EngineState()
        self.channels: dict[str, Channel] = {}
        self.asked: list[str] = []
        self.on_submit: Callable[[], None] = lambda: None
        self.on_ask: Callable[[], None] = lambda: None
        self.refuses: Exception | None = None  # what its streams fail with at once
        self.answers: dict[type, Any] = {}  # by the kind of question
        self.silent = False  # answers no question
        self.hides_tokens = False

    @property
    def state(self) -> EngineState:  # type: ignore[override]
        return self.phase

    @property
    def origin(self) -> Origin:
        return Origin("host", host=self.label)

    def submit(self, request: GenerationRequest) -> Stream:
        self.asked.append(request.request_id)
        self.on_submit()
        if self.phase.is_gone:
            raise EngineGoneError(self.phase.reason or "gone")
        if self.phase.phase == "draining":
            raise DrainingError("it drains")
        if self.refuses is not None:
            channel = Channel(request.request_id, self.abort)
            channel.fail(self.refuses)
            return Stream(channel)
        if self.hides_tokens:
            request = replace(request, show_tokens=False)
        stream = super().submit(request)
        self.channels[request.request_id] = stream.channel
        return stream

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        return self._answered(lambda: super(Mortal, self).embed(request))

    def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
        known = self.answers.get(type(inquiry.question))
        if known is not None:
            answer: Future[Any] = Future()
            answer.set_result(known)
            return answer
        return self._answered(lambda: super(Mortal, self).inquire(inquiry))

    def _answered(self, ask: Callable[[], Future[Any]]) -> Future[Any]:
        self.asked.append("question")
        self.on_ask()
        if self.phase.is_gone:
            raise EngineGoneError(self.phase.reason or "gone")
        if not self.silent:
            return ask()
        self.kept: Future[Any] = Future()
        return self.kept

    def drain(self) -> None:
        self.phase = EngineState("draining", "it drains")

    def end(self, *, blameless: bool = False) -> None:
        """As its client sees the end of its process."""
        self.phase = EngineState("gone", f"{self.label} has ended", blameless=blameless)
        channels = list(self.channels.values())
        for channel in channels:
            channel.fail(EngineGoneError(f"{self.label} has ended."))
            self.engine.abort(channel.request_id)
        for channel in channels:
            channel.wake()
        if self.silent:
            self.kept.set_exception(EngineGoneError(f"{self.label} has ended."))

    def close(self) -> None:
        if not self.phase.is_gone:
            self.end(blameless=True)


def request(
    request_id: str = "x", max_tokens: int = 40, prompt: str = PROMPT, **more: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id,
        SamplingParams(max_tokens=max_tokens, **more.pop("sampling", {})),
        prompt,
        **more,
    )


def undisturbed(wanted: GenerationRequest) -> Any:
    with contextlib.closing(FakeClient(runner=FakeRunner(n_slots=8))) as client:
        return client.submit(wanted).result(30)


def busy(members: list[Mortal]) -> Mortal:
    """The replica that computes."""
    found: list[Mortal] = []

    def look() -> bool:
        found[:] = [m for m in members if m.stats().num_running and not m.phase.is_gone]
        return bool(found)

    wait_for(look)
    return found[0]
