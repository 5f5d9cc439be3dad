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


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((3, 4, 6), np.uint8), "moveaxis"),
        (np.zeros((0, 4), np.uint8), "no picture"),
        (np.full((4, 4), -1.0), "go from -1 to -1"),
        (np.full((4, 4), np.nan), "pixels go from 0"),
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
    for wrong in (sound, b"hello", (np.zeros((2, 2)), 16_000), None):
        with pytest.raises(llmkit.InvalidRequestError, match="sound"):
            sound_file(wrong)


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
