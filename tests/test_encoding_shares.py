"""Who gets how much of the encoder, and of steps for images: no caller keeps others waiting."""

from __future__ import annotations

import pytest
from fake_runner import FakeRunner
from media_parts import Picture, prompt_of
from test_media_engine import BLUE, RED, Studio, reference

from llmkit.protocol import FinishReason


def test_one_callers_albums_do_not_keep_others_waiting() -> None:
    studio = Studio(FakeRunner(n_slots=4), by_hand=True)
    for i in range(8):
        studio.ask(prompt_of(*(Picture(f"{i} {j}") for j in range(16)), b"?"), caller="albums")
    studio.step()
    one = studio.ask(prompt_of(BLUE, b"?"), caller="one")
    for _ in range(400):
        studio.step()
        if one.finish_reason is None and studio.encoder.left:
            studio.encoder.go_on()
            studio.take()
    assert studio.encoder.begun.index("blue") <= 3, "two were begun before, one more at most"
    assert one.finish_reason is FinishReason.LENGTH


def test_what_was_encoded_is_charged_even_for_who_has_gone() -> None:
    studio = Studio(FakeRunner(), by_hand=True)
    studio.ask(prompt_of(b"stays"), 4, caller="other")
    studio.step()
    gone = studio.ask(prompt_of(RED, b"?"), caller="gone")
    studio.step()
    studio.abort(gone)
    before = studio.scheduler.waiting.service("gone")
    studio.encoder.go_on()
    studio.take()
    steps = 0.5 / studio.clock.decode_s(1)  # so long did the encoder take
    assert studio.scheduler.waiting.service("gone") == pytest.approx(before + 2 * steps, abs=2)


def test_after_a_whole_image_beyond_a_steps_budget_streams_go_on_alone() -> None:
    runner = FakeRunner(n_slots=3, max_batch_tokens=100)
    studio = Studio(runner, target_s=0.001)
    stream = studio.ask(prompt_of(b"stream"), 90)
    for _ in range(3):
        studio.step()
    prompts = [prompt_of(Picture(f"w{i}", 60, 60, whole=True), b"?") for i in range(2)]
    first, second = (studio.ask(prompt, 1) for prompt in prompts)
    budget, began = studio.clock.prefill_budget(1), []
    while second.finish_reason is None:
        studio.step()
        began.append((first.num_computed_tokens >= 60, second.num_computed_tokens >= 60))
    between = began.index((True, True)) - began.index((True, False))
    assert between >= 60 // budget and stream.finish_reason is None
    assert [studio.text(r) for r in (first, second)] == [reference(studio, p, 1) for p in prompts]
