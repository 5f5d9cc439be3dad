"""Pictures and sounds in Python: as people have them, in chats, sessions and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from IPython.core.error import UsageError
from pictures import RED, address, encoded, picture
from PIL import Image
from scripted_model import ScriptedModel
from speech import tone, wav

import llmkit
from llmkit.llm import LLM
from llmkit.media import pictures, sounds
from llmkit.media.given import picture_file, sound_file
from llmkit.notebook.display import conversation_html
from llmkit.protocol import Message
from llmkit.runtime.loaded import loaded
from llmkit.sessions.messages import as_messages

PNG = picture(RED)
ASKED = "What is this?"
PIXELS = np.zeros((4, 6, 3), np.uint8) + np.uint8(RED)


@pytest.fixture
def model() -> ScriptedModel:
    model = ScriptedModel("seer", inputs=("image", "audio"))
    model.token_s = 0.0
    return model


@pytest.fixture
def llm(model: ScriptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setenv("LLMKIT_DB_URL", f"sqlite:///{tmp_path}/llmkit.db")
    llm = LLM(model)
    yield llm
    llm.unload()


def told(model: ScriptedModel) -> list[tuple[str, list[str | bytes]]]:
    request = model.asked[-1]
    return [
        (m.role, [p if isinstance(p, str) else request.media[p.digest] for p in m.parts])
        for m in request.messages or ()
    ]


def figure() -> Any:
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([1, 2])
    return drawn


class Displayed:
    """As `IPython.display.Image`."""

    def _repr_png_(self) -> bytes:
        return PNG


@pytest.mark.parametrize(
    "given",
    [
        PIXELS,
        PIXELS / 255.0,
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float32),
        np.concatenate([PIXELS, np.full((4, 6, 1), 255, np.uint8)], axis=2),
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS).convert("HSV"),
        PNG,
        bytearray(PNG),
        address(PNG),
        Displayed(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_pictures_of_all_kinds(given: Any) -> None:
    assert (pictures.pixels(picture_file(given)) == RED).all()


def test_a_photo_is_upright_however_it_is_given(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "photo.jpg", exif=exif)
    opened = Image.open(tmp_path / "photo.jpg")
    assert opened.size == (40, 20)
    for given in (opened, tmp_path / "photo.jpg", (tmp_path / "photo.jpg").read_bytes()):
        assert pictures.pixels(picture_file(given)).shape == (40, 20, 3)  # high, wide


def test_grey_pictures_figures_and_files(tmp_path: Path) -> None:
    grey = picture_file(np.eye(5, dtype=bool))
    assert pictures.pixels(grey)[0, 0].tolist() == [255, 255, 255]
    assert pictures.pixels(picture_file(np.eye(5)[..., None])).shape == (5, 5, 3)
    assert pictures.facts(picture_file(figure())).width > 20
    path = tmp_path / "red.png"
    path.write_bytes(PNG)
    assert picture_file(path) == picture_file(str(path)) == PNG


def test_what_exceeds_the_range_by_arithmetic_is_cut_off() -> None:
    shares = np.array([[-1e-7, 0.5], [1.0000001, 1.01]])
    expected = [[0, 128], [255, 255]]
    for given in (shares, shares.astype(np.float32), np.array([[-0.2, 128.0], [255.3, 257.0]])):
        assert pictures.pixels(picture_file(given))[..., 0].tolist() == expected


@pytest.mark.parametrize(
    ("numbers", "seen"),
    [
        (np.array([[0.0, 0.2], [0.4, 1.0]], np.float32), [[0, 51], [102, 255]]),
        (np.array([[0.0, 51.0], [102.0, 255.0]], np.float32), [[0, 51], [102, 255]]),
        (np.array([[0, 51], [102, 255]], np.int32), [[0, 51], [102, 255]]),
        (np.array([[0, 51], [102, 255]], np.int32) * 257, [[0, 51], [102, 255]]),
        (np.array([[0, 51], [102, 255]], np.uint16) * 257, [[0, 51], [102, 255]]),
    ],
)
def test_pictures_of_numbers_keep_their_greys(numbers: np.ndarray, seen: list[list[int]]) -> None:
    assert pictures.pixels(picture_file(Image.fromarray(numbers)))[..., 0].tolist() == seen


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "LA", "RGBA"])
def test_what_is_transparent_stays_so(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    way = {"La": ["LA", "La"], "PA": ["P", "PA"]}.get(mode, [mode])
    for step in way:
        image = image.convert(step)
    if mode == "PA":
        image.putalpha(0)
    assert image.mode == mode
    assert not pictures.alpha(picture_file(image)).any()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((3, 4, 6), np.uint8), "moveaxis"),
        (np.zeros((0, 4), np.uint8), "no picture"),
        (np.full((4, 4), -1.0), "go from -1 to -1"),
        (np.full((4, 4), np.nan), "pixels go from 0"),
        (np.full((4, 4), 1.02), "np.clip"),
        (np.full((4, 4), 257.6), "go from 257.6"),
        (np.full((4, 4), 256), "go from 256 to 256"),
        (Image.new("I", (0, 4)), "no picture"),
        (Image.fromarray(np.full((4, 4), -7, np.int32)), "go from -7 to -7"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "go from 70000"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "pixels go from 0"),
        (np.full((4, 4), 1j), "no pixels"),
        (b"hello", "JPEG, PNG"),
        ("nowhere.png", "cannot be read"),
        ("https://example.org/a.png", "download it"),
        (object(), "give a PIL image"),
        (42, "give a PIL image"),
    ],
)
def test_what_is_no_picture(given: Any, reason: str) -> None:
    with pytest.raises(llmkit.InvalidRequestError, match=reason):
        picture_file(given)


def test_sounds_of_all_kinds(tmp_path: Path) -> None:
    sound = tone(0.5, 16_000)
    made = sounds.samples(sound_file((sound, 16_000)), 16_000)
    assert np.abs(made - sound).max() < 1e-3
    path = tmp_path / "tone.wav"
    path.write_bytes(wav(sound))
    assert sound_file(path) == path.read_bytes() == sound_file(path.read_bytes())
    for wrong in (
        sound,
        b"hello",
        (np.zeros((2, 2)), 16_000),
        None,
        (sound, True),
        (sound, "16000"),
        (sound, 16_000.5),
        (sound, float("nan")),
        (sound * 20_000, 16_000),
        (sound > 0, 16_000),
        (np.full(9000, 1 << 20), 16_000),
    ):
        with pytest.raises(llmkit.InvalidRequestError, match="sound"):
            sound_file(wrong)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "float16"])
def test_samples_are_scaled_by_their_type(kind: str) -> None:
    sound, middle, half = tone(0.5, 16_000), 0.0, 1.0
    if kind != "float16":
        half = 2.0 ** (8 * np.dtype(kind).itemsize - 1)
        middle = half if kind.startswith("u") else 0.0
    array = (sound.astype(np.float64) * half + middle).astype(kind)
    made = sounds.samples(sound_file((array, np.int64(16_000))), 16_000)
    assert np.abs(made - sound).max() < (0.01 if "8" in kind else 1e-3)


def test_a_rate_may_be_any_whole_number(llm: LLM, model: ScriptedModel) -> None:
    array = np.arange(-2000, 2000, dtype=np.int16)
    for rate in (8000, 8000.0, np.int32(8000), np.float32(8000)):
        llm.chat(ASKED, sounds=(array, rate))
        (heard,) = (part for _, parts in told(model) for part in parts if isinstance(part, bytes))
        assert heard[44:] == array.tobytes()
        assert int.from_bytes(heard[24:28], "little") == 8000


def test_a_chat_with_pictures(llm: LLM, model: ScriptedModel) -> None:
    sound = wav(tone(0.2, 16_000))
    llm.chat(ASKED, images=[PNG, Image.fromarray(PIXELS)], sounds=[sound])
    ((role, parts),) = told(model)
    assert role == "user" and parts[0] == PNG and parts[2:] == [sound, ASKED]
    llm.chat(ASKED, images=PNG)
    assert told(model) == [("user", [PNG, ASKED])]
    assert "".join(llm.chat(ASKED, images=PNG, stream=True)) == f"You said: {ASKED}"
    assert told(model) == [("user", [PNG, ASKED])]


def test_openais_parts_in_a_chat(llm: LLM, model: ScriptedModel) -> None:
    sound = wav(tone(0.2, 16_000))
    content = [
        {"type": "text", "text": ASKED},
        {"type": "image_url", "image_url": {"url": address(PNG)}},
        {
            "type": "image_url",
            "image_url": {"url": address(picture(RED, (900, 60))), "detail": "low"},
        },
        {"type": "input_audio", "input_audio": {"data": encoded(sound), "format": "wav"}},
        Image.fromarray(PIXELS),
    ]
    llm.chat([{"role": "system", "content": "Look."}, {"role": "user", "content": content}])
    (_, (_, parts)) = told(model)
    assert parts[:2] == [ASKED, PNG] and parts[3] == sound
    low = parts[2]
    assert isinstance(low, bytes) and pictures.facts(low).width == 512
    with pytest.raises(llmkit.InvalidRequestError, match="input_video"):
        llm.chat([{"role": "user", "content": [{"type": "input_video"}]}])
    with pytest.raises(llmkit.InvalidRequestError, match="only text"):
        as_messages([{"role": "user", "content": content}])


def test_a_model_that_sees_nothing(model: ScriptedModel) -> None:
    blind = LLM(ScriptedModel("blind"))
    with pytest.raises(llmkit.InvalidRequestError, match="blind takes no images"):
        blind.chat(ASKED, images=PNG)
    with pytest.raises(TypeError, match=r"llm.chat\(…, images=\[…\]\), with stream=True"):
        blind.stream("What is this?", images=[PNG])
    with pytest.raises(llmkit.InvalidRequestError, match="no user message"):
        LLM(model).chat([{"role": "system", "content": "x"}], images=PNG)
    blind.unload()


def with_id(llm: LLM) -> Any:
    return llm.session(id="pictures")


@pytest.mark.parametrize("begin", [LLM.session, with_id], ids=["in memory", "in the database"])
def test_a_session_remembers_its_pictures(
    llm: LLM, model: ScriptedModel, tmp_path: Path, begin: Callable[[LLM], Any]
) -> None:
    session = begin(llm)
    session.say(ASKED, images=PNG)
    session.say("And now?")
    assert told(model)[0] == ("user", [PNG, ASKED]) and len(told(model)) == 3
    session.regenerate()
    assert told(model)[0] == ("user", [PNG, ASKED])
    fork = session.fork()
    fork.say("Well?")
    assert told(model)[0] == ("user", [PNG, ASKED])
    loaded = llm.session(path=session.save(tmp_path / "session.json"))
    loaded.say("Again?")
    assert told(model)[0] == ("user", [PNG, ASKED])
    if session.id is not None:
        again = llm.session(id=session.id)
        assert again.messages == session.messages
        again.say("Still?")
        assert told(model)[0] == ("user", [PNG, ASKED])
    assert isinstance(session.messages[0], Message) and session.messages[0].text == ASKED


def test_a_notebook_shows_thumbnails(llm: LLM, model: ScriptedModel) -> None:
    session = llm.session()
    session.say(ASKED, images=picture(RED, (1000, 500)))
    html = conversation_html(session.messages, session.files)
    assert html.count("<img ") == 1 and 'alt="picture, 1000 × 500, PNG"' in html
    assert len(html) < 20_000 and "data:image/png;base64," in html
    panel = llm.chat_panel()
    panel.send("Look.", images=PNG)
    panel.wait(30)
    assert "<img " in panel.html() and told(model)[-1] == ("user", [PNG, "Look."])
    assert panel.edit() == "Look." and "<img " not in panel.html()
    panel.send("Look again.")
    panel.wait(30)
    assert told(model) == [("user", [PNG, "Look again."])]
    panel._repr_mimebundle_()
    assert panel._widgets is not None
    upload = next(
        w for box in panel._widgets["panel"].children for w in getattr(box, "children", ())
        if type(w).__name__ == "FileUpload"
    )  # fmt: skip
    upload.value = ({"name": "a.png", "type": "image/png", "size": len(PNG), "content": PNG,
                     "last_modified": datetime.now(UTC)},)  # fmt: skip
    panel._widgets["box"].value = "And this?"
    panel._widgets["send"].click()
    panel.wait(30)
    assert told(model)[-1] == ("user", [PNG, "And this?"]) and not upload.value
    blind = LLM(ScriptedModel("blind"))
    kinds = [type(w).__name__ for w in blind.chat_panel()._make()["panel"].children[-1].children]
    assert "FileUpload" not in kinds
    blind.unload()


def test_a_panel_takes_back_sounds_and_loses_nothing(llm: LLM, model: ScriptedModel) -> None:
    panel, sound, fail = llm.chat_panel(), wav(tone(0.5, 16_000)), True
    panel.session.say("Hear.", images=PNG, sounds=sound)
    assert panel.edit() == "Hear." and panel.edit() == ""

    def script(said: str) -> str:
        if fail:
            raise llmkit.EngineError("not now")
        return said

    model.script = script  # refused before anything is said: everything is there for the next
    for _ in range(2):
        panel.send("Hear again.")
        assert panel._error == "not now" and panel.edit() == "Hear again."
    fail = False
    panel.send("Hear again.")
    panel.wait(30)
    assert told(model) == [("user", [PNG, sound, "Hear again."])]
    assert panel.edit() == "Hear again."
    panel.send("And this?", images=PIXELS)  # an array, whose truth nobody may ask
    panel.wait(30)
    ((_, parts),) = told(model)
    assert parts[1:] == [sound, "And this?"] and parts[0] != PNG


def test_a_panel_is_not_jammed_by_what_cannot_be_sent(llm: LLM, model: ScriptedModel) -> None:
    panel = llm.chat_panel()
    panel.session.say("Look.", images=PNG)
    panel.edit()
    panel._again = type(panel._again)([b"no picture"], ())
    panel.send("Look again.")
    assert "picture" in panel._error
    panel.send("Look again.")
    panel.wait(30)
    assert not panel._error and told(model) == [("user", ["Look again."])]


def test_a_panel_keeps_the_pictures_of_an_answer_that_failed(
    llm: LLM, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(channel: Any, *_: Any) -> None:
        channel.fail(llmkit.EngineError("it ended"))
        channel.wake()

    panel = llm.chat_panel()
    with monkeypatch.context() as only:
        only.setattr(model, "_speak", fail)
        panel.send("Look.", images=PNG)
        panel.wait(30)
    assert panel._error == "it ended" and panel.edit() == "Look."
    panel.send("Look.")
    panel.wait(30)
    assert told(model) == [("user", [PNG, "Look."])]


def test_the_magic_sends_variables_and_files(
    llm: LLM, model: ScriptedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    from llmkit.notebook.magics import LLMMagics

    loaded.add(None, llm)
    (tmp_path / "red.png").write_bytes(PNG)
    shell = InteractiveShell()
    shell.user_ns["photos"] = {"first": Image.fromarray(PIXELS)}
    magics = LLMMagics(shell, print, print)
    magics.llm(f"-m seer --image photos[first] --image {tmp_path}/red.png", ASKED)
    ((_, parts),) = told(model)
    assert [p if isinstance(p, str) else pictures.facts(p).width for p in parts] == [6, 24, ASKED]
    said = capsys.readouterr().out
    assert said.endswith(f"You said: {ASKED}\n")
    with pytest.raises(UsageError, match=r"nowhere\.png cannot be read"):
        magics.llm("-m seer --image nowhere.png", ASKED)
    loaded.forget(llm)
