"""Images and sounds on llama.cpp: small models of three families give what libmtmd's own helper
gives, however their prompts are cached, copied, parked or interrupted; and a real model says what
it sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import media_models
import numpy as np
import pytest
import tiny_models
from fakes import wait_for
from media_parts import asking, png, wav
from media_reference import Reference
from toy_models import COLOURS, write_colours

from llmkit.backend.llama import LlamaRunner
from llmkit.backend.media import Embeddings
from llmkit.backend.model import LlamaModel
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.chat.template import CHATML
from llmkit.engine import drafter
from llmkit.engine.batch import Batch, Chunk, Open, StepOutput, Truncate
from llmkit.engine.draft import Payoff
from llmkit.engine.media import Item, cells
from llmkit.protocol import (
    Completion,
    GenerationRequest,
    Inquiry,
    Message,
    Resume,
    SamplingParams,
    TokenizeChat,
)
from llmkit.runtime.local import LocalEngine

FAMILIES = {"causal": "phi4", "two-dimensional": "qwen2vl_merger", "whole": "gemma3"}
TALK = "Once upon a time there was a picture, and everybody who saw it said at once: "


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A text model and its projector."""
    folder = tmp_path_factory.mktemp("media")
    kind = FAMILIES[request.param]
    text = folder / "text.gguf"
    if kind == "qwen2vl_merger":
        media_models.write_mrope_text(text)
    else:
        tiny_models.write(text, "llama")
    return text, media_models.write_vision(folder / "mmproj-text.gguf", kind)


@pytest.fixture(scope="module")
def reference(pair: tuple[Path, Path]) -> Iterator[Reference]:
    opened = Reference(*pair)
    yield opened
    opened.close()


@pytest.fixture
def small(pair: tuple[Path, Path]) -> Iterator[LocalEngine]:
    """Its projector is found beside it."""
    engine = LocalEngine(pair[0], n_ctx=768, n_slots=3, threads=1, batch_tokens=96)
    yield engine
    engine.close()


def answers(
    engine: LocalEngine, reference: Reference, *asked: GenerationRequest
) -> list[Completion]:
    """The answers to requests that come at once; each is the helper's."""
    streams = [engine.submit(request) for request in asked]
    done = [stream.result(300) for stream in streams]
    for request, answer in zip(asked, done, strict=True):
        reference.check(request, answer.tokens, CHATML)
    return done


def test_pictures_at_once_and_again(small: LocalEngine, reference: Reference) -> None:
    pictures = [png(i, 40 + 30 * i, 60) for i in range(3)]
    asked = [
        asking(TALK[:20], pictures[0], " number 0"),
        asking(TALK, pictures[1], pictures[2], " number 1"),
        asking(pictures[2], " number 2"),
        asking(TALK[:50], pictures[0], " and ", pictures[0], "?"),
        asking(TALK, pictures[1], " number 4"),
    ]
    cold = answers(small, reference, *asked)
    encoded = small.stats().encoded_total
    assert encoded == 3 and small.stats().media_total == 7
    warm = answers(small, reference, *asked)
    assert small.stats().encoded_total == encoded
    assert [a.usage.prompt_tokens for a in cold] == [a.usage.prompt_tokens for a in warm]
    assert sum(a.usage.cached_tokens for a in warm) > sum(a.usage.cached_tokens for a in cold)
    assert all(a.usage.image_tokens for a in cold)


def test_a_prefix_with_a_picture_is_shared_parked_and_restored(
    small: LocalEngine, reference: Reference
) -> None:
    picture = png(7, 98, 70)
    talk = asking(TALK, picture, " Tell me more. ")
    first = answers(small, reference, talk)[0]
    start = len(small.render(talk)) - 40
    follow = [asking(TALK, picture, f" Tell me more. And {i}? ") for i in range(3)]
    for answer in answers(small, reference, *follow):  # one in place, the others copies
        assert answer.usage.cached_tokens > start
    others = [asking(f"{i} {TALK}", png(20 + i, 56), TALK * 2) for i in range(3)]
    answers(small, reference, *others)
    assert small.stats().host_cached_tokens > 0
    before = small.stats().encoded_total
    again = answers(small, reference, talk)[0]
    assert again.usage.cached_tokens > start and again.tokens == first.tokens
    assert small.stats().encoded_total == before


def test_preempted_and_aborted(
    small: LocalEngine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [
        asking(
            f"{i} ",
            png(40 + i, 84),
            " slowly ",
            max_tokens=400,
            priority=5,
            sampling={"ignore_eos": True},
        )
        for i in range(3)
    ]
    go_on, runner, streams = threading.Event(), small._engine._runner, []
    execute = runner.execute

    def held(batch: Batch) -> StepOutput:
        """They are not to end before the next one comes."""
        if len(streams) == 3 and all(stream.text for stream in streams):
            go_on.wait(60)
        return execute(batch)

    monkeypatch.setattr(runner, "execute", held)
    streams += [small.submit(request) for request in slow]
    wait_for(lambda: all(stream.text for stream in streams))
    urgent = asking("urgent ", png(50, 56), " now")
    gone = small.submit(asking("gone ", png(51, 300, 280), " never", priority=-1))
    go_on.set()
    wait_for(lambda: small.stats().preemptions_total)
    gone.close()
    answers(small, reference, urgent)
    for request, stream in zip(slow, streams, strict=True):
        reference.check(request, stream.result(300).tokens, CHATML)
    answers(small, reference, asking("gone ", png(51, 300, 280), " never"))


def test_deterministic_and_saved(
    pair: tuple[Path, Path], reference: Reference, tmp_path: Path
) -> None:
    talk = asking(TALK, png(3, 70, 98), " What is it? ")
    beside = [asking(f"{i}", png(60 + i, 56), TALK) for i in range(2)]
    options = {"n_ctx": 768, "n_slots": 3, "threads": 1, "prefix_dir": str(tmp_path / "kept")}
    engine = LocalEngine(pair[0], deterministic=True, **options)
    alone = answers(engine, reference, talk)[0]
    engine.close()
    engine = LocalEngine(pair[0], deterministic=True, **options)
    together = answers(engine, reference, *beside, talk)[-1]
    assert together.tokens == alone.tokens
    assert together.usage.cached_tokens > 0 and engine.stats().encoded_total == 2, "from the disk"
    engine.close()


def test_beside_a_draft_model(
    pair: tuple[Path, Path], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It drafts for text alone, since it sees nothing; lookup guesses after pictures too. Both
    change nothing, in slots that held the one and then the other."""
    options = {"n_ctx": 768, "n_slots": 2, "threads": 1, "batch_tokens": 96}
    engine = LocalEngine(pair[0], draft=str(pair[0]), **options)  # it drafts what will come
    monkeypatch.setattr(Payoff, "_best_size", lambda self, most, token_cost: min(4, most))
    monkeypatch.setattr(drafter, "MIN_LOGPROB", -100.0)
    endless = {"max_tokens": 60, "sampling": {"ignore_eos": True}}
    talk = asking(TALK, png(5, 70, 98), " It is ", **endless)
    for turn in range(2):
        before = engine.stats()
        answers(engine, reference, asking(f"{turn} {TALK}", **endless), talk)
        after = engine.stats()
        assert after.accepted_tokens_total > before.accepted_tokens_total + 30
    follow = asking(TALK, png(5, 70, 98), " It is a", png(6, 56), TALK[:30], **endless)
    before = engine.stats()
    followed, _ = answers(engine, reference, follow, asking(f"3 {TALK}", **endless))
    assert followed.usage.cached_tokens > 40
    answers(engine, reference, asking(f"0 {TALK} And then", **endless))
    engine.close()


def test_whole_images_of_several_sizes_at_once(tmp_path: Path) -> None:
    """Each sees all of itself, whatever is computed beside it."""
    model = LlamaModel(tiny_models.write(tmp_path / "text.gguf", "llama"), n_gpu_layers=0)
    runner = LlamaRunner(model, n_ctx=256, n_slots=3, max_batch_tokens=128, threads=1)
    rng, greedy = np.random.default_rng(0), SamplingParams(temperature=0, logprobs=0)

    def image(slot: int, size: int) -> Chunk:
        rows = rng.standard_normal((size, model.n_embd)).astype(np.float32)
        places = np.arange(size, dtype=np.int32)[None]
        item = Item(slot + 1, 0, size, size, whole=True)
        encoded = Embeddings(rows, places)
        return Chunk(slot, 0, cells(item.key, size), False, item=item, encoded=encoded)

    images = [image(0, 9), image(1, 40), image(2, 17)]
    texts = [Chunk(c.slot, len(c.tokens), [5, 6, 7], True) for c in images]
    opened = tuple(Open(i, i + 1, greedy, ()) for i in range(3))
    runner.execute(Batch(tuple(images), opened))
    together = runner.execute(Batch(tuple(texts))).scores
    alone = []
    for picture, text in zip(images, texts, strict=True):
        runner.execute(Batch((picture,), (Truncate(picture.slot, 0),)))
        alone.append(runner.execute(Batch((text,))).scores[0])
    assert [s[0].logprob for s in together] == pytest.approx(
        [s[0].logprob for s in alone], abs=1e-4
    )
    runner.close()
    model.close()


def test_an_answer_goes_on_elsewhere(pair: tuple[Path, Path], reference: Reference) -> None:
    """Its picture is sent again, and read again."""
    talk = asking("It is ", png(9, 98, 70), " that ", max_tokens=16)
    options = {"n_ctx": 768, "n_slots": 2, "threads": 1, "deterministic": True}
    tokens: list[tuple[int, ...]] = []
    for begun in (0, 6):
        engine = LocalEngine(pair[0], **options)
        resume = Resume(tokens[0][:begun]) if begun else None
        answer = answers(engine, reference, replace(talk, resume=resume))[0]
        tokens.append(answer.tokens)
        engine.close()
    assert tokens[0] == tokens[1] and len(tokens[0]) > 6


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    """SmolLM2 with a projector that knows four colours."""
    path = write_colours(tmp_path_factory.mktemp("colours") / "mmproj.gguf")
    engine = LocalEngine("smollm2", n_ctx=1024, n_slots=4, projector=str(path))
    yield engine
    engine.close()


def test_a_real_model_says_what_it_sees(seeing: LocalEngine) -> None:
    """A prompt with a picture is the prompt with its word: the very same tokens."""
    assert seeing.description.inputs == ("image",)
    said = "What colour? The colour of the picture is"
    for name, colour in COLOURS.items():
        seen = seeing.submit(asking(said, png(colour), ".", max_tokens=24)).result(300)
        read = seeing.submit(asking(f"{said} {name}.", max_tokens=24)).result(300)
        assert name in seen.text and seen.tokens == read.tokens
        assert seen.usage.prompt_tokens == read.usage.prompt_tokens
        assert (seen.usage.image_tokens, read.usage.image_tokens) == (1, 0)


def test_ten_turns_over_one_picture(seeing: LocalEngine) -> None:
    picture, before = png((255, 0, 0), 56), seeing.stats().encoded_total
    talk: list[Message] = []
    for turn in range(10):
        parts = ("The picture is", picture, ".") if turn == 0 else (f"Turn {turn}. Go on.",)
        request = asking(*parts, before=talk, files=[picture])
        answer = seeing.submit(request).result(300)
        assert not turn or answer.usage.cached_tokens >= answer.usage.image_tokens + 5
        assert request.messages is not None
        talk = [*request.messages, Message("assistant", answer.text)]
    assert seeing.stats().encoded_total == before + 1


def test_text_loses_nothing_beside_pictures(
    seeing: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookup, shared prefixes and several at once, while a picture is encoded and computed."""
    # Guesses that pay, however busy this machine is.
    monkeypatch.setattr(seeing._engine._clock, "draft_cost", lambda num_streams: 0.05)
    before = seeing.stats()
    again = "one two three four five six seven eight nine ten, " * 4
    seen = seeing.submit(asking("The picture is", png((0, 0, 255), 112), ".", max_tokens=40))
    read = [seeing.submit(asking(f"Repeat: {again}", max_tokens=40)) for _ in range(2)]
    done = [stream.result(300) for stream in read]
    after = seeing.stats()
    assert done[0].tokens == done[1].tokens and "blue" in seen.result(300).text
    assert after.accepted_tokens_total > before.accepted_tokens_total
    assert done[1].usage.cached_tokens > 40


def test_pictures_cross_the_bridge(seeing: LocalEngine) -> None:
    server = BridgeServer(seeing)
    client = BridgeClient(server.connection)
    assert client.description.inputs == ("image",)
    answer = client.submit(asking("The picture is", png((0, 255, 0)), ".")).result(300)
    assert "green" in answer.text and answer.usage.image_tokens == 1
    asked = asking("The picture is", png((0, 255, 0)), ".")
    question = TokenizeChat(asked.messages or (), media=asked.media)
    listed = client.inquire(Inquiry("i", question)).result(30).tokens
    assert len(listed) == answer.usage.prompt_tokens and listed.count(-1) == 1
    client.close()
    server.close()


def test_sound_goes_the_same_way(tmp_path: Path) -> None:
    text = tiny_models.write(tmp_path / "text.gguf", "llama")
    projector = media_models.write_audio(tmp_path / "mmproj-text.gguf")
    reference = Reference(text, projector, n_ctx=2048)
    engine = LocalEngine(text, n_ctx=2048, n_slots=2, threads=1)
    assert engine.description.inputs == ("audio",)
    asked = [asking("Listen: ", wav(i, 0.5 + i), f" What was that, {i}?") for i in range(2)]
    for answer in answers(engine, reference, *asked):
        assert answer.usage.audio_tokens == 750
    assert answers(engine, reference, asked[0])[0].usage.cached_tokens > 750
    engine.close()
    reference.close()
