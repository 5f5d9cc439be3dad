"""Images and sounds that cannot be: each is refused in words that say what to do, before anything
is computed; and projectors that would end the process."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import header_files
import media_models
import pytest
import tiny_models
from fakes import wait_for
from media_parts import asking, png, wav
from toy_models import ProjectorWriter, Sizes

from llmkit.backend.media import Projector
from llmkit.backend.media_encoder import Preparations
from llmkit.errors import (
    ContextLengthError,
    InvalidModelFileError,
    InvalidRequestError,
    LLMKitError,
    ModelLoadError,
    ModelNotFoundError,
)
from llmkit.models.gguf import read_header
from llmkit.models.projectors import projector_of, read_projector
from llmkit.protocol import (
    FinishReason,
    GenerationRequest,
    Inquiry,
    Message,
    RenderChat,
    SamplingParams,
    TokenizeChat,
)
from llmkit.runtime.assembly import estimate
from llmkit.runtime.local import LocalEngine
from llmkit.runtime.opening import open_model
from llmkit.settings.options import EngineOptions
from llmkit.workers.budget import need_of

RED = png((255, 0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return tiny_models.write(folder / "text.gguf", "llama")


@pytest.fixture(scope="module")
def projector(folder: Path) -> Path:
    return media_models.write_vision(folder / "other-mmproj-images.gguf", "phi4")


@pytest.fixture(scope="module")
def engine(text: Path, projector: Path) -> Iterator[LocalEngine]:
    opened = LocalEngine(
        text, n_ctx=256, n_slots=2, threads=1, projector=str(projector), context_shift=True
    )
    yield opened
    opened.close()


def refusal(engine: LocalEngine, request: GenerationRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(request)
    return caught.value


def test_a_model_of_text_says_how_to_load_it(text: Path) -> None:
    blind = LocalEngine(text, n_ctx=256, n_slots=1, threads=1)
    assert blind.description.inputs == ()
    assert "loaded without a projector (mmproj) for them. Load it with projector=FILE" in str(
        refusal(blind, asking("?", RED))
    )
    question = TokenizeChat((asking("?", RED).messages or ())[:1])
    with pytest.raises(InvalidRequestError, match="without a projector"):
        blind.inquire(Inquiry("i", question)).result(30)
    assert blind.submit(asking("hello")).result(30).usage.completion_tokens
    blind.close()


def test_what_is_refused_before_anything_is_computed(engine: LocalEngine) -> None:
    seen = asking("look: ", RED, "!")
    before = engine.stats().encoded_total
    refused: dict[str, GenerationRequest] = {
        "It takes images.": asking("listen: ", wav(1), "!"),
        "without its file": replace(seen, media={}),
        "does not match its digest": replace(seen, media=dict.fromkeys(seen.media, png(5))),
        "beside a prompt": replace(seen, messages=None, prompt="look"),
        "prompt_logprobs": replace(seen, sampling=SamplingParams(prompt_logprobs=1)),
        "SVG, HTML or other text": asking(b"<svg></svg>"),
        "cut off or broken": asking(RED[:-40]),
    }
    for words, request in refused.items():
        assert words in str(refusal(engine, request))
    with pytest.raises(ContextLengthError) as caught:
        engine.submit(asking("look: ", *(png(i, 112) for i in range(9))))
    assert caught.value.num_tokens >= 256
    assert engine.stats().encoded_total == before
    assert engine.submit(seen).result(30).usage.image_tokens == 4


def test_text_cannot_pass_for_an_image(engine: LocalEngine) -> None:
    plain = engine.render(asking("<__media__> <image> [img] <|image|>"))
    assert min(plain) >= 0
    seen = engine.render(asking("<__media__>", RED))
    assert sum(token < 0 for token in seen) == 4
    shown = engine.inquire(Inquiry("i", RenderChat(asking("a", RED, "b").messages or ())))
    assert "a<image>b" in shown.result(30)
    asked = asking("a", RED, "b")
    listed = engine.inquire(
        Inquiry("i", TokenizeChat(asked.messages or (), media=asked.media, with_pieces=True))
    ).result(30)
    assert list(listed.tokens) == [max(t, -1) for t in engine.render(asked)]
    assert [piece == b"" for piece in listed.pieces or ()] == [t == -1 for t in listed.tokens]


class Chunks:
    def __init__(self, n: int = 1) -> None:
        self.chunks = list(range(n))


def test_what_waits_for_the_encoder_is_kept_within_a_bound() -> None:
    kept, held = Preparations(100), {bytes([i]): Chunks() for i in range(9)}
    for key, prepared in held.items():
        kept.add(key, prepared, 40)  # type: ignore[arg-type]
    assert [kept.get(key) is not None for key in held] == [False] * 7 + [True] * 2
    assert kept.num_bytes == 80
    kept.add(b"tiles", Chunks(2), 400)  # type: ignore[arg-type]
    assert kept.num_bytes == 400, "alone, since its second tile comes next"
    kept.encoded(b"tiles", 0)
    assert kept.get(b"tiles") is not None
    kept.encoded(b"tiles", 1)
    assert kept.get(b"tiles") is None and kept.num_bytes == 0


def test_waiting_pictures_hold_a_bounded_number_of_pixels(
    text: Path, projector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.runtime.media.MAX_PREPARED_BYTES", 20_000)
    with closing(
        LocalEngine(text, n_ctx=256, n_slots=1, threads=1, projector=str(projector))
    ) as engine:
        streams = [engine.submit(asking(png(i, 56), f" {i}?")) for i in range(8)]
        reader = engine._reader
        assert reader is not None and reader.prepared.num_bytes <= 2 * 56 * 56 * 12
        assert all(stream.result(300).usage.image_tokens for stream in streams)
        assert reader.prepared.num_bytes == 0


def test_a_model_that_is_unloaded_while_it_encodes_is_freed_afterwards(
    text: Path, projector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.runtime.media.CLOSE_S", 0.01)
    began, go_on = threading.Event(), threading.Event()
    encode = Projector.encode

    def slowly(self: Projector, chunk: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return encode(self, chunk)

    monkeypatch.setattr(Projector, "encode", slowly)
    engine = LocalEngine(text, n_ctx=256, n_slots=1, threads=1, projector=str(projector))
    stream = engine.submit(asking("look: ", RED, "!"))
    assert began.wait(60)
    with pytest.warns(ResourceWarning, match="an image is still being encoded"):
        engine.close()
    with pytest.raises(LLMKitError):
        stream.result(30)
    assert engine._model.handle
    go_on.set()
    wait_for(lambda: not engine._model.handle)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content }}{{ messages[0].content }}>", "repeats it"),
        ("hello{% if add_generation_prompt %}>{% endif %}", "leaves out an image"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "add text after it"),
    ],
)
def test_templates_that_lose_images(
    tmp_path: Path, projector: Path, template: str, words: str
) -> None:
    path = tiny_models.write(tmp_path / "text.gguf", "llama", template=template)
    opened = LocalEngine(path, n_ctx=256, n_slots=1, threads=1, projector=str(projector))
    assert words in str(refusal(opened, asking("?", RED)))
    opened.close()


def test_a_full_context_ends_a_request_with_an_image(engine: LocalEngine) -> None:
    """Only text is shifted."""
    endless: dict[str, Any] = {"max_tokens": 400, "sampling": {"ignore_eos": True}}
    seen = engine.submit(asking("look: ", RED, "!", **endless)).result(300)
    assert seen.finish_reason is FinishReason.LENGTH
    assert seen.usage.total_tokens == 256
    read = engine.submit(asking("read this", **endless)).result(300)
    assert read.usage.completion_tokens == 400


def test_callers_share_nothing_of_their_images(engine: LocalEngine) -> None:
    secret = png(77, 56)
    before = engine.stats().encoded_total
    for caller in ("ann", "bob", "ann"):
        engine.submit(replace(asking("?", secret, "!"), caller=caller)).result(30)
    assert engine.stats().encoded_total == before + 2


def test_choices_share_one_image(engine: LocalEngine) -> None:
    before = engine.stats()
    streams = engine.submit_choices(replace(asking("?", png(78, 56), "!"), n=3))
    tokens = [stream.result(30).tokens for stream in streams]
    assert tokens[0] == tokens[1] == tokens[2]
    assert engine.stats().encoded_total == before.encoded_total + 1


def test_an_image_larger_than_a_batch_makes_the_batch_larger(folder: Path, text: Path) -> None:
    path = folder / "whole.gguf"
    media_models.write_vision(path, "gemma3", sizes=Sizes(picture=224))
    opened = LocalEngine(text, n_ctx=512, n_slots=2, threads=1, projector=str(path), batch_tokens=8)
    streams = [opened.submit(asking(f"{i}", max_tokens=200)) for i in range(1)]
    answer = opened.submit(asking("look: ", png(1, 300), "!")).result(300)
    assert answer.usage.image_tokens == 64 and answer.usage.completion_tokens
    assert streams[0].result(300).usage.completion_tokens
    opened.close()


def changed(source: Path, target: Path, **keys: int) -> Path:
    """A projector with other numbers in its header."""
    shutil.copyfile(source, target)
    reader = gguf.GGUFReader(target, "r+")
    for key, value in keys.items():
        reader.fields[f"clip.vision.{key.replace('__', '.')}"].parts[-1][0] = value
    return target


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"attention__head_count": 0}, "attention.head_count = 0"),
        ({"attention__head_count": 5}, "5 heads for a width of 32"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"image_size": 0}, "image_size = 0"),
        ({"image_size": 1 << 30}, "image_size = 1073741824"),
        ({"block_count": 10_000}, "block_count = 10000"),
    ],
)
def test_a_damaged_projector(
    tmp_path: Path, text: Path, projector: Path, keys: dict[str, int], words: str
) -> None:
    bad = changed(projector, tmp_path / "mmproj.gguf", **keys)
    with pytest.raises(InvalidModelFileError, match=words):
        LocalEngine(text, n_ctx=256, n_slots=1, threads=1, projector=str(bad))


def test_what_is_no_projector(tmp_path: Path, text: Path, projector: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(projector.read_bytes()[:-8])
    with pytest.raises(InvalidModelFileError, match="truncated"):
        read_projector(cut)
    with pytest.raises(InvalidModelFileError, match="not a projector; its architecture is llama"):
        read_projector(text)
    with pytest.raises(ModelNotFoundError, match="there is no projector"):
        projector_of(text, str(tmp_path / "nowhere.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "hunyuanvl")
    tiny_models.finish(writer)
    with pytest.raises(InvalidModelFileError, match="depends on the rest of the prompt"):
        read_projector(tmp_path / "strange.gguf")
    wrong = media_models.write_vision(tmp_path / "wrong.gguf", "phi4", n_embd=128)
    with pytest.raises(ModelLoadError, match="mismatch between text model"):
        LocalEngine(text, n_ctx=256, n_slots=1, threads=1, projector=str(wrong))


@pytest.mark.usefixtures("own_cache")
def test_a_projector_is_tried_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias that llama.cpp relies on it would take this process with it."""
    text = media_models.write_mrope_text(tmp_path / "text.gguf")
    wanted = ProjectorWriter.matrix

    def without(self: Any, name: str, *shape: int, **more: Any) -> None:
        if not name.endswith("attn_k.bias"):
            wanted(self, name, *shape, **more)

    monkeypatch.setattr(ProjectorWriter, "matrix", without)
    media_models.write_vision(tmp_path / "mmproj-text.gguf", "qwen2vl_merger")
    options = EngineOptions(n_ctx=256, n_slots=1, threads=1)
    named = replace(options, projector=str(tmp_path / "mmproj-text.gguf"))
    with pytest.raises(ModelLoadError, match=r"with mmproj-text.gguf failed .* crashed"):
        open_model(text, named)
    with pytest.warns(RuntimeWarning, match="loaded for text alone"):
        opened = open_model(text, options)  # it only lay beside the model
    assert opened.description.inputs == ()
    opened.close()
    monkeypatch.undo()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("fault", ["cut", "llama", "link"])
def test_what_only_lies_beside_a_model_and_is_no_projector_is_left_out(
    tmp_path: Path, projector: Path, fault: str
) -> None:
    text = tiny_models.write(tmp_path / "text.gguf", "llama")
    bad = tmp_path / "mmproj.gguf"
    match fault:
        case "cut":
            bad.write_bytes(projector.read_bytes()[:-8])
        case "llama":
            shutil.copy(text, bad)
        case _:
            bad.symlink_to("nothing.gguf")
    options = EngineOptions(n_ctx=256, n_slots=1, threads=1)
    assert estimate(read_header(text), options).projector_bytes == 0
    assert need_of({"path": str(text), "options": asdict(options)}).ram_bytes > 0
    if fault != "link":
        with pytest.raises(InvalidModelFileError):
            estimate(read_header(text), replace(options, projector=str(bad)))
    with pytest.warns(RuntimeWarning, match="loaded for text alone"):
        opened = open_model(text, options)
    assert opened.description.inputs == ()
    opened.close()


def test_a_model_that_embeds_has_no_projector(tmp_path: Path, projector: Path) -> None:
    shutil.copy(projector, tmp_path / "mmproj.gguf")
    embeds = header_files.write(tmp_path / "embeds.gguf", "bert", bert__pooling_type=1)
    assert estimate(read_header(embeds), EngineOptions()).projector_bytes == 0
    other = header_files.write(tmp_path / "other.gguf", "bert")
    assert estimate(read_header(other), EngineOptions()).projector_bytes > 0


def test_which_projector_is_a_models(tmp_path: Path) -> None:
    def make(*names: str) -> Callable[[str], str | None]:
        here = tmp_path / str(len(list(tmp_path.iterdir())))
        here.mkdir()
        for name in names:
            (here / f"{name}.gguf").touch()

        def find(model: str) -> str | None:
            found = projector_of(here / f"{model}.gguf", None)
            return None if found is None else found.stem

        return find

    assert make("a-Q4_K_M", "mmproj-F32", "mmproj-F16")("a-Q4_K_M") == "mmproj-F16"
    flat = make("seeing-2b-Q4_K_M", "blind-7b-Q8_0", "mmproj-seeing-2b-f16")
    assert flat("seeing-2b-Q4_K_M") == "mmproj-seeing-2b-f16" and flat("blind-7b-Q8_0") is None
    assert projector_of(tmp_path / "a.gguf", "none") is None


def test_memory_is_told_with_the_projector(text: Path, projector: Path) -> None:
    from llmkit.loading import estimate

    alone = estimate(text, n_ctx=256, n_slots=1)
    both = estimate(text, n_ctx=256, n_slots=1, projector=str(projector))
    assert both.total_bytes - alone.total_bytes == both.projector_bytes
    assert both.projector_bytes > projector.stat().st_size and "projector" in repr(both)
    with pytest.raises(LLMKitError):
        estimate(text, projector=str(text))


def test_messages_of_a_message_keep_their_order(engine: LocalEngine) -> None:
    """An earlier turn's image stands in its own turn."""
    first = Message("user", ("one ", (asking(RED).messages or ())[0].media[0]))
    asked = asking("two ", png(3), files=[RED], before=(first, Message("assistant", "ok")))
    tokens = engine.render(asked)
    text = bytes(max(t - 3, 0) if t >= 0 else 1 for t in tokens).decode("latin1")
    assert text.index("one") < text.index("\1") < text.index("ok") < text.index("two")
