"""Images in prompts, on the fake model: whatever comes in whatever order, answers are those of the
cells alone, nothing is encoded twice without need, and nobody waits for somebody else's picture."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runner import END, FakeRunner, piece
from fakes import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from media_parts import FakeEncoder, Picture, Prompt, prompt_of
from scheduler_bench import Bench

from llmkit.engine.detokenize import Detokenizer
from llmkit.engine.draft import PromptLookup
from llmkit.engine.encoding import Encoded, Encodings
from llmkit.engine.engine import Engine
from llmkit.engine.media import item_start, offset
from llmkit.engine.request import Request
from llmkit.errors import EngineError, InvalidRequestError
from llmkit.protocol import FinishReason, SamplingParams
from llmkit.protocol.stream import Channel, Stream

RED, BLUE = Picture("red"), Picture("blue")
WIDE = Picture("wide", n_tokens=40, n_positions=7)  # positions in two dimensions
WHOLE = Picture("whole", n_tokens=60, n_positions=60, whole=True)
BAD = Picture("bad")


class Studio(Bench):
    """A bench whose requests may hold pictures."""

    def __init__(
        self, runner: FakeRunner, *, by_hand: bool = False, max_bytes: int = 1000, **options: Any
    ) -> None:
        self.encoder = FakeEncoder(by_hand)
        self.done: list[Encoded] = []
        self.encodings = Encodings(self.encoder, max_bytes, self.done.append)
        super().__init__(runner, encodings=self.encodings, **options)

    def ask(self, prompt: Prompt, max_tokens: int = 4, **options: Any) -> Request:
        return self.add(prompt[0], max_tokens, media=prompt[1], **options)

    def step(self) -> list[Request]:
        news = super().step()
        self.take()
        return news

    def take(self) -> None:
        while self.done:
            self.note(self.scheduler.take(self.done.pop(0)))

    def answer(self, request: Request) -> bytes:
        self.drain()
        assert request.finish_reason is FinishReason.LENGTH
        return self.text(request)


def reference(bench: Studio, prompt: Prompt, max_tokens: int = 4) -> bytes:
    return bench.runner.reference(prompt[0], max_tokens)


PARTS = st.lists(
    st.one_of(
        st.sampled_from([RED, BLUE, WIDE, WHOLE]),
        st.sampled_from([b"a beginning that is long enough to be shared by several, ", b"hi, "]),
    ),
    max_size=4,
)
ARRIVAL = st.tuples(PARTS, st.binary(min_size=1, max_size=9), st.integers(0, 20), st.integers(0, 2))
EVENT = st.one_of(
    ARRIVAL.map(lambda a: ("add", a)),
    ARRIVAL.map(lambda a: ("add", a)),
    st.integers(0, 30).map(lambda i: ("abort", i)),
    st.integers(1, 12).map(lambda n: ("steps", n)),
    st.integers(1, 3).map(lambda n: ("encode", n)),
    st.sampled_from([("interrupt", 0), ("no room", 0), ("lose", 0), ("error", 0), ("bad", 0)]),
)


@settings(max_examples=300, deadline=None)
@given(
    events=st.lists(EVENT, max_size=50),
    n_slots=st.integers(1, 4),
    capacity=st.sampled_from([None, None, 300]),
    host_tokens=st.sampled_from([0, 150, 5000]),
    truncate=st.booleans(),
    deterministic=st.booleans(),
    tile=st.sampled_from([1, 16]),
    max_bytes=st.sampled_from([0, 60, 1000]),
    target_s=st.sampled_from([None, 0.02]),
)
def test_any_order_of_events_with_pictures_ends_well(
    events: list[Any],
    n_slots: int,
    capacity: int | None,
    host_tokens: int,
    truncate: bool,
    deterministic: bool,
    tile: int,
    max_bytes: int,
    target_s: float | None,
) -> None:
    runner = FakeRunner(n_slots=n_slots, capacity=capacity, host_tokens=host_tokens)
    runner.can_truncate = runner.can_fork = truncate  # type: ignore[misc]
    runner.tile = tile
    studio = Studio(
        runner,
        by_hand=True,
        max_bytes=max_bytes,
        deterministic=deterministic and capacity is None,
        target_s=target_s,
    )
    requests: list[tuple[Request, Prompt]] = []
    ended_early: set[str] = set()
    for kind, value in events:
        if kind == "add":
            parts, rest, max_tokens, priority = value
            prompt = prompt_of(*parts, bytes(97 + c % 26 for c in rest))
            requests.append((studio.ask(prompt, max_tokens, priority=priority), prompt))
        elif kind == "bad":
            requests.append((studio.ask(prompt_of(BAD, b"x")), prompt_of(BAD, b"x")))
        elif kind == "abort" and requests:
            request = requests[value % len(requests)][0]
            if request.finish_reason is None:
                ended_early.add(request.request_id)
            studio.abort(request)
            runner.no_room_next &= len(studio.scheduler.running) > 1
        elif kind == "steps":
            for _ in range(value):
                studio.step()
        elif kind == "encode":
            for _ in range(min(value, len(studio.encoder.left))):
                studio.encoder.go_on()
            studio.take()
        elif kind == "interrupt":
            runner.interrupt()
            studio.step()
            runner.clear_interrupt()
        elif kind == "no room":
            able = [r for r in studio.scheduler.running if not studio.encodings.blocks(r)]
            runner.no_room_next = len(able) > 1
        elif kind == "lose":
            runner.lose_parked = not runner.lose_parked
        elif kind == "error":
            runner.fail_next = "the decode failed"
    runner.lose_parked, runner.fail_next, runner.no_room_next = False, None, False
    for _ in range(3000):
        if not (studio.scheduler.running or len(studio.scheduler.waiting)):
            break
        studio.step()
        if studio.encoder.left:
            studio.encoder.go_on()
            studio.take()
    assert sorted(r.request_id for r in studio.ended) == sorted(r.request_id for r, _ in requests)
    for request, prompt in requests:
        expected = reference(studio, prompt, request.max_tokens)
        if request.request_id in ended_early or request.serial in runner.hurt:
            assert expected.startswith(studio.text(request))
        elif any(item.source == "bad" for item in request.media):
            assert request.finish_reason is FinishReason.ERROR and "it is bad" in str(request.error)
        else:
            assert request.finish_reason is FinishReason.LENGTH, request.error
            assert studio.text(request) == expected
    assert studio.cache.num_free == n_slots
    studio.step()
    assert studio.encodings.num_bytes <= max_bytes


def test_cells_know_where_their_item_begins_and_what_positions_it_takes() -> None:
    tokens, (red, wide) = prompt_of(b"ab", RED, b"c", WIDE, b"d")
    assert (red.start, red.end, wide.start) == (2, 14, 15)
    assert [item_start(tokens, at) for at in (1, 2, 3, 14, 20, 55, 99)] == [1, 2, 2, 14, 15, 55, 99]
    assert [offset(tokens, at) for at in (0, 2, 14, 15, 55, 56)] == [0, 0, 0, 0, -33, -33]
    twice, _ = prompt_of(WIDE, WIDE)
    assert offset(twice, 80) == -66


def test_ten_turns_over_one_picture_encode_it_once() -> None:
    studio = Studio(FakeRunner(n_ctx=600))
    parts: list[bytes | Picture] = [b"what is this? ", WIDE]
    for turn in range(10):
        parts.append(b" turn %d: " % turn)
        request = studio.ask(prompt := prompt_of(*parts))
        answer = studio.answer(request)
        assert answer == reference(studio, prompt)
        assert not turn or request.num_cached_tokens >= request.media[0].end
        parts.append(answer)
    assert studio.encodings.num_encoded == 1


def test_one_picture_at_once_in_several_requests_is_encoded_and_computed_once() -> None:
    studio = Studio(FakeRunner())
    requests = [studio.ask(prompt_of(WIDE, b"?%d" % i)) for i in range(4)]
    studio.drain()
    assert studio.encodings.num_encoded == 1
    assert [r.num_cached_tokens for r in requests] == [0, 41, 41, 41]
    other = studio.ask(prompt_of(Picture("tall", 40, 7), b"?0"))
    assert studio.answer(other) == reference(studio, prompt_of(Picture("tall", 40, 7), b"?0"))
    assert other.num_cached_tokens == 0 and studio.encodings.num_encoded == 2


def test_text_goes_on_beside_a_picture_that_is_being_encoded() -> None:
    studio = Studio(FakeRunner(), by_hand=True)
    seeing = studio.ask(prompt_of(b"look: ", RED, b"!"))
    text = studio.ask(prompt_of(b"hello"), 5)
    assert studio.answer(text) == reference(studio, prompt_of(b"hello"), 5)
    assert studio.encoder.left == ["red"] and seeing.num_computed_tokens == 6
    assert studio.scheduler.num_encoding == 1 and not studio.scheduler.has_work
    studio.encoder.go_on()
    studio.take()
    assert studio.answer(seeing) == reference(studio, prompt_of(b"look: ", RED, b"!"))


def test_what_is_whole_is_computed_whole_however_many_streams_run() -> None:
    runner = FakeRunner(n_slots=4, max_batch_tokens=60)  # as many as the picture alone
    studio = Studio(runner, target_s=0.001)
    for i in range(3):
        studio.ask(prompt_of(b"stream %d" % i), 60)
    for _ in range(4):
        studio.step()
    request = studio.ask(prompt_of(b"look: ", WHOLE, b"!"), 4)
    for _ in range(12):
        studio.step()
    assert request.finish_reason is FinishReason.LENGTH, "it did not wait for the streams' end"
    assert studio.text(request) == reference(studio, prompt_of(b"look: ", WHOLE, b"!"))
    studio.drain()


def test_the_next_picture_of_each_goes_first_and_an_abort_takes_the_rest_away() -> None:
    studio = Studio(FakeRunner(n_slots=2), by_hand=True)
    album = studio.ask(prompt_of(*(Picture(f"album {i}") for i in range(5)), b"?"))
    studio.step()
    assert studio.encoder.begun == ["album 0", "album 1"]
    urgent = studio.ask(prompt_of(BLUE, b"?"))
    waiting = studio.ask(prompt_of(RED, b"?"))
    studio.step()
    studio.encoder.go_on()
    studio.take()
    studio.step()
    assert studio.encoder.begun[2:] == ["blue"], "before the album's third"
    studio.abort(album)
    studio.encoder.go_on()
    studio.encoder.go_on()
    studio.take()
    studio.step()
    assert studio.encoder.begun[3:] == ["red"], "and nothing more of the album"
    studio.encoder.go_on()
    studio.take()
    studio.drain()
    assert urgent.finish_reason is waiting.finish_reason is FinishReason.LENGTH


def test_what_is_needed_is_kept_and_the_rest_within_the_bound() -> None:
    studio = Studio(FakeRunner(n_slots=1), max_bytes=24, by_hand=True)
    first = studio.ask(prompt_of(*(Picture(f"a{i}") for i in range(3)), b"?"))
    studio.ask(prompt_of(Picture("b"), b"?"))
    for _ in range(4):
        studio.step()
        while studio.encoder.left:
            studio.encoder.go_on()
            studio.take()
    assert studio.encoder.begun[:2] == ["a0", "a1"] and studio.encodings.num_bytes <= 24
    while studio.scheduler.running or len(studio.scheduler.waiting):
        studio.step()
        while studio.encoder.left:
            studio.encoder.go_on()
            studio.take()
    assert studio.encoder.begun == ["a0", "a1", "a2", "b"], "each once, in order"
    assert studio.encodings.num_bytes <= 24 and first.finish_reason is FinishReason.LENGTH


def test_what_was_dropped_is_encoded_again_for_who_computes_it_again() -> None:
    studio = Studio(FakeRunner(n_slots=1), max_bytes=12)
    slow = studio.ask(prompt_of(RED, b" slowly"), 30, priority=5)
    for _ in range(6):
        studio.step()
    urgent = studio.ask(prompt_of(BLUE, b" now"), 4)
    studio.drain()
    assert studio.ended == [urgent, slow] and studio.encoder.begun == ["red", "blue", "red"]
    assert studio.text(slow) == reference(studio, prompt_of(RED, b" slowly"), 30)


def test_a_cached_prefix_is_not_encoded_ahead() -> None:
    studio = Studio(FakeRunner(n_slots=2), max_bytes=12)
    studio.answer(studio.ask(prompt_of(RED, b" one")))
    studio.answer(studio.ask(prompt_of(BLUE, b" other"), 30))  # red is no longer kept
    busy = [studio.ask(prompt_of(b"busy %d" % i), 20, priority=-1) for i in range(2)]
    studio.step()
    again = studio.ask(prompt_of(RED, b" one more"))
    studio.drain()
    assert again.num_cached_tokens in (0, 12 + 4) and len(busy) == 2
    assert studio.encoder.begun.count("red") == (1 if again.num_cached_tokens else 2)


def test_guesses_are_text() -> None:
    tokens, _ = prompt_of(b"abcde", RED, b"abcde")
    assert PromptLookup().propose(tokens, most=4, token_cost=0.1) == []
    tokens, _ = prompt_of(RED, b"abcde fgh abcde")
    assert PromptLookup().propose(tokens, most=4, token_cost=0.1) == list(b" fgh")


@pytest.fixture
def hand() -> FakeEncoder:
    return FakeEncoder(by_hand=True)


def submit(engine: Engine, prompt: Prompt, max_tokens: int = 4) -> Stream:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    channel = Channel(f"r{id(prompt)}", engine.abort)
    request = Request(prompt[0], sampling, max_tokens, Detokenizer(piece), channel, media=prompt[1])
    engine.submit(request)
    return Stream(channel)


def test_an_engine_that_waits_for_pictures_does_nothing_else(
    hand: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner(n_slots=2)
    engine = Engine(runner, is_end=lambda t: t == END, encoder=hand, encoded_bytes=100)
    planned = []
    schedule = engine._scheduler.schedule
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: [planned.append(1), schedule()][1])
    streams = [submit(engine, prompt_of(Picture(f"p{i}"), b"?")) for i in range(4)]
    queued = engine._scheduler.waiting  # all have come, and then it has looked at them
    wait_for(lambda: engine.stats.num_encoding == len(queued) == 2 and engine._is_stuck)
    before = len(planned)
    assert not engine._scheduler.has_work or engine._is_stuck
    assert len(planned) == before <= 8, "two run, two wait, and nobody asks again and again"
    assert [r.is_encoding for r in engine.requests()] == [True, True]
    wait_for(lambda: (engine.stats.num_running, engine.stats.num_waiting) == (2, 2))
    assert engine.stats.requests_total == 4, "those that wait are counted before anything is done"
    while not all(s.finished for s in streams):
        wait_for(lambda: hand.left or all(s.finished for s in streams))
        if hand.left:
            hand.go_on()
    assert [s.result(30).text.encode() for s in streams] == [
        runner.reference(prompt_of(Picture(f"p{i}"), b"?")[0], 4) for i in range(4)
    ]
    assert engine.stats.encoded_total == engine.stats.media_total == 4
    assert engine.stats.encode_seconds_total == 2.0 and streams[0].result().usage.image_tokens == 12
    assert engine.close()


def test_when_the_encoder_rests_the_engine_has_its_cores_again(
    hand: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(FakeRunner(n_slots=2), is_end=lambda t: t == END, encoder=hand)
    freed = []
    monkeypatch.setattr(engine._governor, "free", lambda: freed.append(len(hand.left)))
    streams = [submit(engine, prompt_of(Picture(f"p{i}"), b"?")) for i in range(2)]
    wait_for(lambda: len(hand.left) == 2)
    hand.go_on()
    streams[0].result(30)
    assert not freed, "the other one is still being encoded"
    hand.go_on()
    streams[1].result(30)
    assert freed == [0]
    assert engine.close()


def test_a_picture_that_fails_ends_its_own_requests(hand: FakeEncoder) -> None:
    runner = FakeRunner()
    engine = Engine(runner, is_end=lambda t: t == END, encoder=hand, encoded_bytes=100)
    bad = [submit(engine, prompt_of(b"x%d" % i, BAD, b"?")) for i in range(2)]
    good = submit(engine, prompt_of(RED, b"?"))
    wait_for(lambda: hand.left == ["bad", "red"])
    hand.go_on()
    for stream in bad:
        with pytest.raises(EngineError, match="the image could not be encoded: it is bad"):
            stream.result(30)
    hand.go_on()
    assert good.result(30).text.encode() == runner.reference(prompt_of(RED, b"?")[0], 4)
    assert engine.close()


def test_a_file_that_is_refused_when_it_is_read_again_is_the_callers_fault(
    hand: FakeEncoder,
) -> None:
    engine = Engine(FakeRunner(), is_end=lambda t: t == END, encoder=hand, encoded_bytes=100)
    stream = submit(engine, prompt_of(Picture("refused"), b"?"))
    wait_for(lambda: hand.left)
    hand.go_on()
    with pytest.raises(InvalidRequestError, match="could not be encoded: it is cut off"):
        stream.result(30)
    assert engine.close()


def test_abort_while_it_is_encoded(hand: FakeEncoder) -> None:
    engine = Engine(FakeRunner(), is_end=lambda t: t == END, encoder=hand, encoded_bytes=100)
    stream = submit(engine, prompt_of(RED, b"?"))
    wait_for(lambda: hand.left)
    stream.close()
    wait_for(lambda: engine.stats.num_running == 0)
    hand.go_on()
    wait_for(lambda: engine.stats.encoded_total == 1)
    assert submit(engine, prompt_of(RED, b"?")).result(30).text, "and it is of use to others"
    assert engine.close()
