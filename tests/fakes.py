"""An engine on the fake model, a request for it, and ways to wait for what happens beside."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import threading
import time
from concurrent.futures import Future
from typing import Any

from fake_runner import END, FakeRunner, piece

from llmkit.engine.detokenize import Detokenizer, ResumedDetokenizer
from llmkit.engine.engine import Engine
from llmkit.engine.request import Request
from llmkit.engine.resuming import resume
from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.llm import LLM
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ListSlots,
    Message,
    ModelDescription,
    Origin,
    RenderChat,
    SamplingParams,
    Tokenize,
    TokenizeChat,
    Tokens,
    Vocabulary,
)
from llmkit.protocol.stream import Channel, Stream


def _rendered(messages: tuple[Message, ...]) -> str:
    return "".join(f"[{m.role}]{m.text}" for m in messages)


class FakeClient:
    """An `EngineClient` over a real `Engine` on a `FakeRunner`."""

    def __init__(
        self,
        name: str = "fake",
        runner: FakeRunner | None = None,
        max_waiting: int = 1024,
        **options: Any,
    ) -> None:
        """``options`` are the `Engine`'s."""
        self.runner = runner or FakeRunner()
        self.shifts = bool(options.get("context_shift"))
        self.engine = Engine(
            self.runner, is_end=lambda t: t == END, max_waiting=max_waiting, **options
        )
        self.description = ModelDescription(
            name,
            f"{name}.gguf",
            n_ctx=self.runner.n_ctx,
            n_slots=self.runner.n_slots,
            n_vocab=256,
            weights_bytes=1000,
            created=int(time.time()),
        )

    @property
    def state(self) -> EngineState:
        return EngineState.gone_for(self.engine.failure)

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        return [self.submit(choice) for choice in request.choices()]

    def submit(self, request: GenerationRequest) -> Stream:
        if request.messages is not None:
            prompt = list("".join(f"[{m.role}]{m.text}" for m in request.messages).encode())
        else:
            prompt = list(
                request.prompt.encode() if isinstance(request.prompt, str) else request.prompt or ()
            )
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token.", "prompt")
        if len(prompt) >= self.runner.n_ctx:
            raise ContextLengthError(len(prompt), self.runner.n_ctx)
        room = self.runner.n_ctx - len(prompt)
        channel = Channel(request.request_id, self.abort)
        begun, stop = request.resume, request.sampling.stop
        detokenizer = (
            Detokenizer(piece, stop)
            if begun is None
            else ResumedDetokenizer(piece, stop, begun.sent_chars)
        )
        wanted = request.sampling.max_tokens
        who = {"priority": request.priority, "caller": request.caller, "cache_salt": request.salt}
        who["weight"] = request.weight
        made = Request(
            prompt,
            request.sampling,
            room if wanted is None else wanted if self.shifts else min(wanted, room),
            detokenizer,
            channel,
            show_tokens=request.show_tokens,
            **who,  # type: ignore[arg-type]
        )
        if begun is not None:
            resume(
                made,
                begun,
                is_end=lambda t: t == END,
                n_vocab=256,
                n_ctx=self.runner.n_ctx,
                context_shift=self.shifts,
            )
        self.engine.submit(made)
        return Stream(channel)

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        """Two numbers a text: its length, and one."""
        future: Future[Embeddings] = Future()
        if any(not text for text in request.inputs):
            raise InvalidRequestError("a text to embed is empty.", "input")
        sizes = tuple(len(text) for text in request.inputs)
        future.set_result(Embeddings(b"".join(struct.pack("<ff", n, 1) for n in sizes), 2, sizes))
        return future

    def inquire(self, inquiry: Inquiry[Any]) -> Future[Any]:
        """Bytes are tokens."""
        future: Future[Any] = Future()
        match inquiry.question:
            case Detokenize(tokens):
                if any(not 0 <= t < 256 for t in tokens):
                    raise InvalidRequestError("tokens: token ids go from 0 to 255.", "tokens")
                future.set_result(bytes(tokens).decode())
            case RenderChat(messages):
                future.set_result(_rendered(messages))
            case ListSlots():
                future.set_result(())
            case DescribeVocabulary():
                future.set_result(Vocabulary("", "\0", False, ""))
            case (Tokenize() | TokenizeChat()) as question:
                text = (
                    question.text
                    if isinstance(question, Tokenize)
                    else _rendered(question.messages)
                )
                data = text.encode()
                pieces = tuple(bytes([b]) for b in data) if question.with_pieces else None
                future.set_result(Tokens(tuple(data), pieces))
        return future

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self.engine.stats

    def close(self) -> None:
        assert self.engine.close(30)


_ids = itertools.count()


def ask(
    prompt: str, *, priority: int = 0, caller: str = "", cache_salt: str = "", **sampling: object
) -> GenerationRequest:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(
        f"r{next(_ids)}",
        params,
        prompt=prompt,
        priority=priority,
        caller=caller,
        cache_salt=cache_salt,
    )


def wait_for(condition: object, timeout: float = 30.0) -> None:
    """Poll until ``condition()`` is true."""
    end = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def interrupt_after(llm: LLM, tokens: int) -> None:
    """Press stop once so many tokens more have been made."""
    before = llm.stats.generation_tokens_total

    def press() -> None:
        wait_for(lambda: llm.stats.generation_tokens_total > before + tokens, 60)
        if llm.stats.num_running:  # else nobody would catch it, and all tests would end
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
