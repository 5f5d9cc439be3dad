"""A model of about fifty lines: deterministic, and strict about the KV discipline. Tokens are bytes, so text needs no vocabulary."""

from __future__ import annotations

import itertools
import threading
import time
import zlib

from llmkit.engine.batch import Batch, Fork, Open, StepOutput, Truncate
from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.engine import Engine
from llmkit.engine.request import Request
from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.stream import Channel, Stream
from llmkit.types import EngineStats, GenerationRequest, ModelDescription

END = 0
BAD_SEED = 666  # a request whose sampler cannot be made


class FakeRunner:
    """Implements `ModelRunner`: the next token is a letter computed from all tokens before it, or ``END`` after ``end_after`` tokens in a slot."""

    can_truncate = can_fork = True

    def __init__(self, n_slots: int = 4, n_ctx: int = 256, max_batch_tokens: int = 64, step_s: float = 0.0, end_after: int = 10**9) -> None:
        self.n_slots, self.n_ctx, self.max_batch_tokens = n_slots, n_ctx, max_batch_tokens
        self.step_s, self.end_after = step_s, end_after
        self.slots: list[list[int]] = [[] for _ in range(n_slots)]
        self.opened = [False] * n_slots
        self.batches: list[Batch] = []
        self.fail_next: str | None = None
        self.no_room_next = False
        self.crash_next = False
        self._interrupt = threading.Event()
        self.num_interrupted = 0
        self.faults: list[tuple[int, str]] = []
        self.closed = False

    def next_token(self, tokens: list[int]) -> int:
        return END if len(tokens) >= self.end_after else 97 + zlib.crc32(bytes(t % 256 for t in tokens)) % 26

    def execute(self, batch: Batch) -> StepOutput:
        assert not self.closed
        self.batches.append(batch)
        for op in batch.ops:
            if isinstance(op, Fork):
                assert op.length <= len(self.slots[op.source]), "fork beyond what is resident"
                assert self.can_fork and (self.can_truncate or op.length == len(self.slots[op.source]))
                self.slots[op.target] = self.slots[op.source][: op.length]
            elif isinstance(op, Truncate):
                assert op.length <= len(self.slots[op.slot]) and (self.can_truncate or op.length == 0)
                del self.slots[op.slot][op.length :]
            else:
                assert isinstance(op, Open)
                self.opened[op.slot] = True
                self.faults = [(s, why) for s, why in self.faults if s != op.slot]
                if op.sampling.seed == BAD_SEED:
                    self.faults.append((op.slot, "no such sampler"))
        if self.crash_next:
            raise RuntimeError("the fake is broken")
        assert batch.num_tokens <= self.max_batch_tokens
        assert [c.slot for c in batch.chunks] == sorted({c.slot for c in batch.chunks}), "one chunk a slot, in order"
        nothing = [None] * len(batch.chunks)
        if self.no_room_next:
            self.no_room_next = False
            return StepOutput(nothing, [c.start for c in batch.chunks], no_room=True)
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            return StepOutput(nothing, [0] * len(batch.chunks), error=error)
        interrupted = self._interrupt.wait(self.step_s) if self.step_s else self._interrupt.is_set()
        tokens: list[int | None] = []
        for chunk in batch.chunks:
            slot = self.slots[chunk.slot]
            assert self.opened[chunk.slot] and len(slot) == chunk.start, "positions must be contiguous"
            assert chunk.tokens and chunk.start + len(chunk.tokens) <= self.n_ctx
            if interrupted:  # half of it was done
                slot.extend(list(chunk.tokens)[: len(chunk.tokens) // 2])
                continue
            slot.extend(chunk.tokens)
            tokens.append(self.next_token(slot) if chunk.sample else None)
        resident = [len(self.slots[c.slot]) for c in batch.chunks]
        if interrupted:
            self.num_interrupted += 1
            return StepOutput(nothing, resident, interrupted=True)
        return StepOutput(tokens, resident, faults=tuple(self.faults))

    def interrupt(self) -> None:
        self._interrupt.set()

    def clear_interrupt(self) -> None:
        self._interrupt.clear()

    def close(self) -> None:
        self.closed = True

    def reference(self, prompt: bytes, max_tokens: int) -> bytes:
        """What this model continues ``prompt`` with."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            token = self.next_token(tokens)
            if token == END:
                break
            tokens.append(token)
        return bytes(tokens[len(prompt) :])


def piece(token: int) -> bytes:
    return bytes([token % 256])


class FakeClient:
    """An `EngineClient` over a real `Engine` on a `FakeRunner`."""

    def __init__(self, name: str = "fake", runner: FakeRunner | None = None, max_waiting: int = 1024) -> None:
        self.runner = runner or FakeRunner()
        self.engine = Engine(self.runner, is_end=lambda t: t == END, max_waiting=max_waiting)
        self.description = ModelDescription(
            name, f"{name}.gguf", n_ctx=self.runner.n_ctx, n_slots=self.runner.n_slots, n_vocab=256, weights_bytes=1000, created=int(time.time())
        )

    def submit(self, request: GenerationRequest) -> Stream:
        if request.messages is not None:
            prompt = list("".join(f"[{m.role}]{m.content}" for m in request.messages).encode())
        else:
            prompt = list(request.prompt.encode() if isinstance(request.prompt, str) else request.prompt or ())
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token.", "prompt")
        if len(prompt) >= self.runner.n_ctx:
            raise ContextLengthError(len(prompt), self.runner.n_ctx)
        room = self.runner.n_ctx - len(prompt)
        channel = Channel(request.request_id, self.abort)
        detokenizer = Detokenizer(piece, request.sampling.stop)
        self.engine.submit(Request(prompt, request.sampling, min(request.sampling.max_tokens or room, room), detokenizer, channel))
        return Stream(channel)

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self.engine.stats

    def close(self) -> None:
        assert self.engine.close()


_ids = itertools.count()


def ask(prompt: str, **sampling: object) -> GenerationRequest:
    from llmkit.types import SamplingParams

    return GenerationRequest(f"r{next(_ids)}", SamplingParams(**{"temperature": 0, "max_tokens": 8, **sampling}), prompt=prompt)  # type: ignore[arg-type]


def wait_for(condition: object, timeout: float = 10.0) -> None:
    """Poll until ``condition()`` is true."""
    end = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
