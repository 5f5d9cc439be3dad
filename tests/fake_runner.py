"""A small model: deterministic, and strict about the KV discipline, positions included. Tokens are
bytes, so text needs no vocabulary; what an image or a sound is encoded to is its key."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence

from llmkit.engine.batch import (
    Batch,
    Chunk,
    Close,
    Drop,
    Fork,
    Open,
    Park,
    Restore,
    Score,
    Shift,
    SlotOp,
    StepOutput,
    Truncate,
)
from llmkit.engine.media import cells
from llmkit.protocol import (
    SamplingParams,
)

END = 0


BAD_SEED = 666  # a request whose sampler cannot be made


class FakeRunner:
    """Implements `ModelRunner`: the next token is a letter computed from the tokens before it and
    the adapters, or ``END`` after ``end_after`` tokens."""

    can_truncate = can_fork = True
    saves = False
    num_threads = tile = 1

    def __init__(
        self,
        n_slots: int = 4,
        n_ctx: int = 256,
        max_batch_tokens: int = 64,
        step_s: float = 0.0,
        end_after: int = 10**9,
        capacity: int | None = None,
        host_tokens: int = 0,
        letters: int = 26,
    ) -> None:
        self.n_slots, self.n_ctx, self.max_batch_tokens = n_slots, n_ctx, max_batch_tokens
        self.capacity, self.host_tokens = capacity, host_tokens
        self.step_s, self.end_after, self.letters = step_s, end_after, letters
        self.slots: list[list[int]] = [[] for _ in range(n_slots)]
        # The position after each token; None within an image, which cannot be cut there.
        self.places: list[list[int | None]] = [[] for _ in range(n_slots)]
        self.parked_places: dict[int, list[int | None]] = {}
        self.parked: dict[int, list[int]] = {}
        self.saved_keys: set[int] = set()
        self.adapters: list[tuple[tuple[str, float], ...]] = [
            ()
        ] * n_slots  # that a slot's content was made with
        self.parked_adapters: dict[int, tuple[tuple[str, float], ...]] = {}
        self.serials = [0] * n_slots
        self.open: dict[int, SamplingParams] = {}
        self.batches: list[Batch] = []
        self.before: Callable[[Batch], object] = lambda _: None  # called as a step begins
        self.fail_next: str | None = None
        self.no_room_next = False
        self.crash_next = False
        self.fault_next: tuple[int, bool] | None = (
            None  # which chunk fails alone, and whether its slot is emptied
        )
        self.hurt: set[int] = set()  # requests, by serial, that an error of ours ended
        self.lose_parked = False
        self._interrupt = threading.Event()
        self.interrupted: list[Batch] = []
        self.faults: list[tuple[int, str]] = []
        self.closed = False

    def set_threads(self, count: int) -> None:
        raise AssertionError("one thread is all there is")

    def saved(self) -> list[tuple[int, list[int], str]]:
        return []

    def next_token(self, tokens: list[int], adapters: tuple[tuple[str, float], ...] = ()) -> int:
        # A cell of an image by all of its number, not by its last byte.
        seen = bytes(t % 256 if t >= 0 else t % 251 for t in tokens[-40:]) + (
            repr(adapters).encode() if adapters else b""
        )
        return END if len(tokens) >= self.end_after else 97 + zlib.crc32(seen) % self.letters

    def score(self, tokens: list[int], token: int) -> Score:
        """Of ``token`` after ``tokens``."""
        return Score(-float(len(tokens)), ((token, -float(token)),))

    def _apply(self, op: SlotOp, broken: set[int], lost: list[int]) -> None:
        match op:
            case Fork():
                assert op.length <= len(self.slots[op.source]) or op.source in broken, (
                    "fork beyond what is resident"
                )
                assert op.source in broken or (
                    self.can_fork and (self.can_truncate or op.length == len(self.slots[op.source]))
                )
                self.slots[op.target] = self.slots[op.source][: op.length]
                self.places[op.target] = self.places[op.source][: op.length]
                self.adapters[op.target] = self.adapters[op.source]
                if op.source in broken:
                    self.slots[op.target], self.places[op.target] = [], []
                    broken.add(op.target)
                else:
                    self._cut_right(op.target, op.length, op.offset)
            case Truncate():
                assert op.slot in broken or (
                    op.length <= len(self.slots[op.slot]) and (self.can_truncate or op.length == 0)
                )
                del self.slots[op.slot][op.length :]
                del self.places[op.slot][op.length :]
                if op.slot not in broken:
                    self._cut_right(op.slot, op.length, op.offset)
            case Shift():
                assert op.keep + op.discard < len(self.slots[op.slot])
                del self.slots[op.slot][op.keep : op.keep + op.discard]
                assert min(self.slots[op.slot]) >= 0, "an image would lose its place"
                self.places[op.slot] = [i + 1 for i in range(len(self.slots[op.slot]))]
            case Park():
                assert list(op.tokens) == self.slots[op.slot], "parked is what is resident"
                if op.save and self.lose_parked:
                    lost.append(op.key)
                    self.hurt.add(self.serials[op.slot])
                    return
                self.parked[op.key], self.parked_adapters[op.key] = (
                    list(op.tokens),
                    self.adapters[op.slot],
                )
                self.parked_places[op.key] = list(self.places[op.slot])
                if op.save:
                    self.saved_keys.add(op.key)
            case Restore():
                if self.lose_parked:
                    self.slots[op.slot], self.places[op.slot] = [], []
                    broken.add(op.slot)
                    lost.append(op.key)
                else:
                    assert op.length <= len(self.parked[op.key]) and (
                        self.can_truncate or op.length == len(self.parked[op.key])
                    )
                    self.slots[op.slot] = self.parked[op.key][: op.length]
                    self.places[op.slot] = self.parked_places[op.key][: op.length]
                    self._cut_right(op.slot, op.length, op.offset)
                    self.adapters[op.slot] = self.parked_adapters[op.key]
            case Drop():
                del self.parked[op.key]
            case Open():
                adapters = tuple(op.adapters)
                assert not self.slots[op.slot] or self.adapters[op.slot] == adapters, (
                    "what an adapter computed is of no use with another"
                )
                self.serials[op.slot], self.adapters[op.slot] = op.serial, adapters
                self.open.setdefault(op.serial, op.sampling)
                self.faults = [(s, why) for s, why in self.faults if s != op.slot]
                if op.sampling.seed == BAD_SEED:
                    self.faults.append((op.slot, "no such sampler"))
            case Close():
                self.open.pop(op.serial, None)

    def _cut_right(self, slot: int, length: int, offset: int) -> None:
        """Whether a slot that was cut ends at the position that the engine means, and not within an
        image."""
        assert length != len(self.slots[slot]) or self._end(slot) == length + offset

    def _end(self, slot: int) -> int | None:
        return self.places[slot][-1] if self.places[slot] else 0

    def _grow(self, chunk: Chunk, tokens: Sequence[int]) -> None:
        """Add tokens of a chunk to its slot."""
        slot, places, item = self.slots[chunk.slot], self.places[chunk.slot], chunk.item
        for token in tokens:
            if item is None:
                assert token >= 0, "text does not go with cells of an image"
                places.append(len(slot) + 1 + chunk.offset)
            else:
                is_last = len(slot) + 1 == item.end
                places.append(item.start + chunk.offset + item.n_positions if is_last else None)
            slot.append(token)

    def _check_place(self, chunk: Chunk) -> None:
        """A chunk continues its slot, in positions too, and brings what its cells stand for."""
        slot, item, end = self.slots[chunk.slot], chunk.item, self._end(chunk.slot)
        assert len(slot) == chunk.start, "positions must be contiguous"
        if item is None:
            assert end == chunk.start + chunk.offset
            return
        assert item.start <= chunk.start and chunk.start + len(chunk.tokens) <= item.end
        begun = chunk.start - item.start
        assert list(chunk.tokens) == cells(item.key, item.n_tokens)[begun:][: len(chunk.tokens)]
        assert chunk.encoded == ("encoded", item.key) and not (chunk.draft or chunk.targets)
        assert end is None if begun else end == item.start + chunk.offset
        assert not item.whole or len(chunk.tokens) == item.n_tokens
        assert not chunk.sample, "a prompt ends with text"

    def execute(self, batch: Batch) -> StepOutput:
        assert not self.closed
        self.batches.append(batch)
        self.before(batch)
        broken: set[int] = set()
        lost: list[int] = []
        for op in batch.ops:
            self._apply(op, broken, lost)
        assert (
            sum(len(tokens) for key, tokens in self.parked.items() if key not in self.saved_keys)
            <= self.host_tokens
        )
        if self.crash_next:
            raise RuntimeError("the fake is broken")
        for whole, media in ((True, True), (False, True), (False, False)):  # a decode each
            together = [
                len(c.tokens)
                for c in batch.chunks
                if media == (c.item is not None) and whole == (c.item is not None and c.item.whole)
            ]
            assert sum(together) <= self.max_batch_tokens
        assert [c.slot for c in batch.chunks] == sorted({c.slot for c in batch.chunks}), (
            "one chunk a slot, in order"
        )
        nothing: list[tuple[int, ...]] = [()] * len(batch.chunks)
        if self.no_room_next or (
            self.capacity and batch.num_tokens + sum(map(len, self.slots)) > self.capacity
        ):
            self.no_room_next = False
            return StepOutput(
                nothing,
                [c.start for c in batch.chunks],
                no_room=True,
                lost=lost,
                broken=tuple(broken),
            )
        if self.fail_next:
            error, self.fail_next = self.fail_next, None
            self.hurt |= {self.serials[c.slot] for c in batch.chunks}
            return StepOutput(
                nothing, [0] * len(batch.chunks), error=error, lost=lost, broken=tuple(broken)
            )
        interrupted = self._interrupt.wait(self.step_s) if self.step_s else self._interrupt.is_set()
        tokens: list[tuple[int, ...]] = []
        prompt_scores: list[list[Score]] = []
        fault = self._fault(batch, broken) if not interrupted else None
        for chunk in batch.chunks:
            prompt_scores.append(
                [
                    self.score(self.slots[chunk.slot] + list(chunk.tokens[: i + 1]), t)
                    for i, t in enumerate(chunk.targets)
                ]
            )
            if chunk.slot in broken:
                tokens.append(())
                continue
            slot = self.slots[chunk.slot]
            assert self.serials[chunk.slot] in self.open
            self._check_place(chunk)
            assert chunk.tokens and chunk.start + len(chunk.tokens) <= self.n_ctx
            known = list(chunk.tokens)[: len(chunk.tokens) - chunk.draft]
            if interrupted:  # half of it was done
                if chunk.item is None:
                    self._grow(chunk, known[: len(known) // 2])
                else:  # it cannot be cut but at its beginning
                    del slot[chunk.item.start :]
                    del self.places[chunk.slot][chunk.item.start :]
                continue
            self._grow(chunk, known)
            if chunk.slot == fault:
                assert self.fault_next is not None
                if self.fault_next[1]:
                    slot.clear()
                    self.places[chunk.slot].clear()
                self.fault_next = None
                tokens.append(())
                continue
            chosen = []
            for guess in (*chunk.tokens[len(known) :], None):
                if chunk.sample:
                    chosen.append(self.next_token(slot, self.adapters[chunk.slot]))
                    if guess != chosen[-1]:
                        break
                    self._grow(chunk, [guess])
            tokens.append(tuple(chosen))
        resident = [len(self.slots[c.slot]) for c in batch.chunks]
        if interrupted:
            self.interrupted.append(batch)
            return StepOutput(nothing, resident, interrupted=True, lost=lost, broken=tuple(broken))
        faults = [*self.faults, *([(fault, "it alone went wrong")] if fault is not None else [])]
        emptied = [c.slot for c in batch.chunks if c.slot == fault and not self.slots[c.slot]]
        return StepOutput(
            tokens,
            resident,
            faults=tuple(faults),
            lost=lost,
            broken=tuple(broken),
            emptied=emptied,
            prompt_scores=prompt_scores,
        )

    def _fault(self, batch: Batch, broken: set[int]) -> int | None:
        """The slot that fails alone in this step."""
        able = [c.slot for c in batch.chunks if c.slot not in broken]
        if self.fault_next is None or not able:
            return None
        slot = able[self.fault_next[0] % len(able)]
        self.hurt.add(self.serials[slot])
        return slot

    def of_first(self, slot: int) -> list[Batch]:
        """The steps of the first request that had a slot, until another began there."""
        found, opened = [], 0
        for batch in self.batches:
            opened += sum(isinstance(op, Open) and op.slot == slot for op in batch.ops)
            if opened == 1 and any(chunk.slot == slot for chunk in batch.chunks):
                found.append(batch)
        return found

    def interrupt(self) -> None:
        self._interrupt.set()

    def clear_interrupt(self) -> None:
        self._interrupt.clear()

    def close(self) -> None:
        self.closed = True

    def reference(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        adapters: tuple[tuple[str, float], ...] = (),
        shifts: bool = False,
    ) -> bytes:
        """What this model continues ``prompt`` with; ``shifts``: a full context keeps the prompt
        and the newer half of the rest."""
        tokens, output = list(prompt), []
        for _ in range(max_tokens):
            token = self.next_token(tokens, adapters)
            if token == END:
                break
            tokens.append(token)
            output.append(token)
            if shifts and len(tokens) >= self.n_ctx:
                keep = min(len(tokens) // 2, len(prompt))
                del tokens[keep : keep + (len(tokens) - keep) // 2]
        return bytes(output)


def piece(token: int) -> bytes:
    return bytes([token % 256])
