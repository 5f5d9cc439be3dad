"""Pictures in conversations that are kept: stored once, told again in later turns, exported with
their files, and gone with the last conversation that has them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pictures import BLUE, RED, address, encoded, picture
from scripted_model import ScriptedModel, ServedModels
from test_media_dialects import ASKED, told

from llmkit.errors import InvalidRequestError
from llmkit.gateway.chats import Chat
from llmkit.gateway.conversations.fitting import _counter
from llmkit.media.addresses import digest_of
from llmkit.protocol import Inquiry, Media, Message, SamplingParams, Tokens
from llmkit.store import media
from llmkit.store.conversation_records import NewMessage
from llmkit.store.conversations import ConversationStore
from llmkit.store.database import open_database

PNG, OTHER = picture(RED), picture(BLUE)
PART = {"type": "image_url", "image_url": {"url": address(PNG)}}
OWNER = "local"


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    model = ScriptedModel("seer", inputs=("image",))
    model.token_s = 0.0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def served(folder: Path, model: ScriptedModel) -> Iterator[ServedModels]:
    served = ServedModels(folder, model, ScriptedModel("blind"), max_media_bytes=5_000_000)
    yield served
    served.stop()


def post(served: ServedModels, path: str, body: dict[str, Any], status: int = 200) -> Any:
    reply = httpx.post(served.url + path, json=body, timeout=30)
    assert reply.status_code == status, reply.text
    return reply.json()


def begun(served: ServedModels) -> str:
    """A session in which a picture was asked about."""
    content = [{"type": "text", "text": ASKED}, PART]
    turn = post(served, "v1/sessions/new/messages", {"model": "seer", "content": content})
    session: str = turn["session"]
    return session


def test_later_turns_see_the_picture(served: ServedModels, model: ScriptedModel) -> None:
    session = begun(served)
    assert told(model) == [("user", [ASKED, PNG])]
    post(served, f"v1/sessions/{session}/messages", {"model": "seer", "content": "And now?"})
    assert told(model)[0] == ("user", [ASKED, PNG]) and told(model)[-1] == ("user", ["And now?"])
    found = httpx.get(served.url + f"v1/sessions/{session}/messages", timeout=30).json()["data"]
    assert found[0]["content"] == [
        {"type": "text", "text": ASKED},
        {"type": "media", "digest": digest_of(PNG), "kind": "image"},
    ]
    last = found[-1]["id"]
    post(served, f"v1/sessions/{session}/messages/{last}/regenerate", {"model": "seer"})
    assert told(model)[0] == ("user", [ASKED, PNG])
    kept: Any = found[0]["content"][1]
    edited = {"model": "seer", "content": [{"type": "text", "text": "Why?"}, kept]}
    reply = httpx.patch(
        served.url + f"v1/sessions/{session}/messages/{found[0]['id']}", json=edited, timeout=30
    )
    assert reply.status_code == 200 and told(model) == [("user", ["Why?", PNG])]
    file = httpx.get(served.url + f"v1/sessions/{session}/media/{digest_of(PNG)}", timeout=30)
    assert file.content == PNG and file.headers["content-type"] == "image/png"
    assert "sandbox" in file.headers["content-security-policy"]
    missing = httpx.get(served.url + f"v1/sessions/{session}/media/{'0' * 64}", timeout=30)
    assert missing.status_code == 404
    post(served, f"v1/sessions/{session}/messages", {"model": "blind", "content": "See?"}, 400)
    strange = [{"type": "media", "digest": "0" * 64, "kind": "image"}]
    post(served, f"v1/sessions/{session}/messages", {"model": "seer", "content": strange}, 400)


@pytest.mark.parametrize("forgets", [False, True])
def test_to_be_counted_each_file_is_sent_once(forgets: bool) -> None:
    """And once more to an engine that has forgotten it."""
    sent: list[int] = []

    def inquire(inquiry: Inquiry[Any]) -> Future[Tokens]:
        sent.append(len(inquiry.question.media))
        if forgets and len(sent) == 2:
            raise InvalidRequestError("messages: the file of a message is missing.")
        counted: Future[Tokens] = Future()
        counted.set_result(Tokens((1, 2, 3)))
        return counted

    engine: Any = SimpleNamespace(
        description=ScriptedModel("seer", inputs=("image",)).description, inquire=inquire
    )
    waiting: Any = SimpleNamespace(check=lambda: None, result=lambda f, s: f.result(s))
    files = {digest_of(data): data for data in (PNG, OTHER)}
    said = [Message("user", ("?", Media(digest, "image"))) for digest in files]
    chat = Chat(messages=tuple(said), sampling=SamplingParams(), media=files)
    count = _counter(engine, chat, "", waiting)
    assert [count(said), count(said), count(said[:1])] == [3, 3, 3]
    assert sent == ([2, 0, 2, 0] if forgets else [2, 0, 0])


def test_a_fork_and_an_import_have_the_picture(served: ServedModels, model: ScriptedModel) -> None:
    session = begun(served)
    fork = post(served, f"v1/sessions/{session}/fork", {})["id"]
    exported = httpx.get(served.url + f"v1/sessions/{session}/export", timeout=30).json()
    assert exported["messages"][0]["content"][1] == PART
    copy = post(served, "v1/sessions/import", exported)["id"]
    httpx.delete(served.url + f"v1/sessions/{session}", timeout=30)
    for other in (fork, copy):
        post(served, f"v1/sessions/{other}/messages", {"model": "seer", "content": "And?"})
        assert told(model)[0] == ("user", [ASKED, PNG])


def test_dialects_with_a_session_id(served: ServedModels, model: ScriptedModel) -> None:
    body = {
        "model": "seer",
        "session_id": "seen",
        "messages": [{"role": "user", "content": ASKED, "images": [encoded(PNG)]}],
        "stream": False,
    }
    post(served, "api/chat", body)
    body["messages"] = [{"role": "user", "content": "And?"}]
    post(served, "api/chat", body)
    assert told(model)[0] == ("user", [PNG, ASKED]) and told(model)[-1] == ("user", ["And?"])


def test_appended_without_an_answer(served: ServedModels, model: ScriptedModel) -> None:
    session = post(served, "v1/sessions", {"messages": [{"role": "user", "content": [PART]}]})
    assert session["num_messages"] == 1
    more = {"messages": [{"role": "user", "content": [PART]}], "reply": False}
    post(served, f"v1/sessions/{session['id']}/messages", more)
    post(served, f"v1/sessions/{session['id']}/messages", {"model": "seer", "content": "Well?"})
    assert told(model) == [("user", [PNG]), ("user", [PNG]), ("user", ["Well?"])]
    svg = {"type": "image_url", "image_url": {"url": address(b"<svg/>")}}
    post(served, "v1/sessions", {"messages": [{"role": "user", "content": [svg]}]}, 400)


class Clock:
    now = 1000.0


def test_files_are_kept_once_and_go_with_the_last_that_uses_them(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/sessions.db")
    clock = Clock()
    store = ConversationStore(database, now=lambda: clock.now)

    def num_bytes() -> int:
        with database.connected() as connection:
            return media.num_bytes(connection, OWNER)

    content = [{"type": "media", "digest": digest_of(PNG), "kind": "image"}]
    message = NewMessage("user", content, media={digest_of(PNG): PNG})
    first = store.create(OWNER, messages=[message, message])
    second = store.create(OWNER, messages=[message])
    assert num_bytes() == len(PNG)
    assert store.media("other", [digest_of(PNG)]) == {}
    stranger = store.create("other", messages=[NewMessage("user", content)])
    assert store.media("other", [digest_of(PNG)]) == {}
    clock.now += 100
    store.delete(OWNER, first.id)
    assert num_bytes() == len(PNG)
    store.delete(OWNER, second.id)
    store.delete("other", stranger.id)
    assert num_bytes() == 0
    # One that was just added may be used by somebody else in the same moment.
    third = store.create(OWNER, messages=[message])
    store.delete(OWNER, third.id)
    assert num_bytes() == len(PNG)
    clock.now += 100
    store.remove_expired()
    assert num_bytes() == 0
    database.close()


def test_an_owner_may_not_have_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_database(f"sqlite:///{tmp_path}/sessions.db")
    store = ConversationStore(database)
    monkeypatch.setattr(media, "MAX_OWNER_BYTES", len(PNG))

    def said(data: bytes) -> NewMessage:
        message = Message("user", (ASKED, Media(digest_of(data), "image")))
        return NewMessage.of(message, media={digest_of(data): data})

    known = store.create(OWNER, messages=[said(PNG)])
    store.append(OWNER, known.id, known.head, [said(PNG)])
    with pytest.raises(InvalidRequestError, match="delete some first"):
        store.append(OWNER, known.id, known.head, [said(OTHER)])
    assert store.export(OWNER, known.id)["messages"][0]["content"][1] == PART
    database.close()


def test_conversations_with_pictures_make_way_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(f"sqlite:///{tmp_path}/sessions.db")
    clock = Clock()
    store = ConversationStore(database, now=lambda: clock.now)
    files = [picture(RED, (20 + i, 20), "BMP") for i in range(5)]
    monkeypatch.setattr(media, "MAX_OWNER_BYTES", sum(len(files[i]) for i in (0, 1, 3, 4)))

    def said(data: bytes) -> NewMessage:
        message = Message("user", (ASKED, Media(digest_of(data), "image")))
        return NewMessage.of(message, media={digest_of(data): data})

    known = []
    for data in files[:3]:
        known.append(store.create(OWNER, messages=[said(data)]).id)
        clock.now += 100
    plain = store.create(OWNER, messages=[Message("user", "no picture")]).id
    store.in_use(lambda: [known[1]])
    clock.now += 100
    store.append(OWNER, known[0], None, [said(files[4]), said(files[3])])  # it is the oldest itself

    def left() -> list[str]:
        return [each.id for each in store.listed(OWNER)[0]]

    assert sorted(left()) == sorted([known[0], known[1], plain])
    assert set(store.media(OWNER, map(digest_of, files))) == {
        digest_of(files[i]) for i in (0, 1, 3, 4)
    }
    database.close()


def test_what_others_added_to_an_imported_part_is_left_out(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/sessions.db")
    store = ConversationStore(database)
    far = {"type": "image_url", "image_url": {"url": "https://example.org/a", "x": 1}, "src": "b"}
    near = {**PART, "src": "https://example.org/b"}
    content = [{"type": "text", "text": ASKED, "onclick": "c"}, far, near]
    known = store.import_(OWNER, {"messages": [{"role": "user", "content": content}]})
    (message,) = store.opened(OWNER, known.id)[1]
    assert message.content == [
        {"type": "text", "text": ASKED},
        {"type": "image_url", "image_url": {"url": "https://example.org/a"}},
        {"type": "media", "digest": digest_of(PNG), "kind": "image"},
    ]
    database.close()


def test_a_stored_response_keeps_its_picture_apart(
    served: ServedModels, model: ScriptedModel
) -> None:
    large = picture(RED, (900, 700), "BMP")  # more than a response may be
    assert len(large) > 1 << 20
    image = {"type": "input_image", "image_url": address(large, "image/bmp")}
    text = {"type": "input_text", "text": ASKED}
    asked = {"model": "seer", "input": [{"role": "user", "content": [image, text]}]}
    httpx.delete(served.url + "v1/sessions", timeout=30)
    first = post(served, "v1/responses", asked)
    assert first["store"] is True
    second = post(
        served,
        "v1/responses",
        {"model": "seer", "input": "And?", "previous_response_id": first["id"]},
    )
    assert told(model)[0] == ("user", [large, ASKED]) and told(model)[-1] == ("user", ["And?"])
    items = httpx.get(served.url + f"v1/responses/{first['id']}/input_items", timeout=30).json()[
        "data"
    ]
    assert items[0]["content"] == [image, text]
    reference = {"type": "item_reference", "id": items[0]["id"]}
    post(served, "v1/responses", {"model": "seer", "input": [reference]})
    assert told(model) == [("user", [large, ASKED])]
    # What continues a response keeps what that was asked with.
    assert httpx.delete(served.url + f"v1/responses/{first['id']}", timeout=30).status_code == 200
    again = {"model": "seer", "input": "And?", "previous_response_id": second["id"]}
    post(served, "v1/responses", again)
    assert told(model)[0] == ("user", [large, ASKED])
    strange = {"type": "input_image", "image_url": "llmkit-media:" + "0" * 64}
    asked["input"] = [{"role": "user", "content": [strange]}]
    post(served, "v1/responses", asked, 400)
