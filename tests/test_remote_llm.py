"""All of `LLM` on models behind `llmkit serve`, over HTTP: the tests of a model in this process,
and what they leave out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from fakes import wait_for
from IPython.core.interactiveshell import InteractiveShell
from test_cli import Served
from test_llm import (
    test_async,
    test_generate_chat_stream_and_batches,
    test_monitor_without_widgets,
    test_stop_in_a_batch_loses_nothing,
    test_stop_keeps_the_text_so_far,
)

import llmkit
from llmkit.errors import AccessError, ContextLengthError, InvalidRequestError
from llmkit.system.process import kernel_id

__all__ = [  # the same tests, on this file's ``llm``
    "test_async", "test_generate_chat_stream_and_batches", "test_monitor_without_widgets",
    "test_stop_in_a_batch_loses_nothing", "test_stop_keeps_the_text_so_far",
]  # fmt: skip

pytestmark = pytest.mark.model
KEY = "k"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    served = Served(
        "smollm2", "minilm", "--port", "0", "--n-ctx", "1024", "--n-slots", "4",
        "--base-path", "/services/llmkit", LLMKIT_API_KEY=KEY,
    )  # fmt: skip
    yield served
    code, errors = served.stop()
    assert code == 0 and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def llm(server: Served) -> Iterator[llmkit.LLM]:
    handle = llmkit.attach(server.url, key=KEY, model="smollm2")  # waits until it is loaded
    yield handle
    handle.unload()


def test_what_is_known_of_it(llm: llmkit.LLM) -> None:
    assert llm.model.n_ctx == 1024 and llm.model.n_slots == 4 and llm.name == "smollm2"
    assert "135M parameters" in repr(llm) and llm.engine.origin.pid is None
    tokens = llm.tokenize("Hello there")
    assert llm.detokenize(tokens) == "Hello there"
    assert "Paris" in llm.generate("The capital of France is", max_tokens=4, temperature=0).text
    with pytest.raises(ContextLengthError):
        llm.generate("word " * 5000)
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate("x", temperature=-1)
    with pytest.raises(AccessError):
        llmkit.attach(llm.engine.origin.url, key="wrong")


def test_probabilities_and_shapes(llm: llmkit.LLM) -> None:
    one = llm.generate("One, two,", max_tokens=5, temperature=0, logprobs=3)
    assert len(one.logprobs) == 5 and all(len(p.top) == 3 for p in one.logprobs)
    assert b"".join(p.piece for p in one.logprobs).decode() == one.text
    assert "<span" in llm.show_tokens(one)._repr_html_()
    assert 1 < llm.perplexity("The quick brown fox jumps over the lazy dog.") < 1000
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    made = llm.chat("A number as JSON.", json_schema=schema, max_tokens=30, temperature=0)
    assert made.text.lstrip().startswith("{")
    assert llm.chat("Yes or no?", choice=["yes", "no"]).text in ("yes", "no")


def test_tools_and_conversations(llm: llmkit.LLM) -> None:
    asked: list[str] = []

    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    llm.chat("Weather in Paris?", tools=[weather], tool_choice="weather", max_tokens=60, seed=1)
    assert asked
    session = llm.session("Be brief.")
    session.say("Say yes.", max_tokens=5, temperature=0)
    reply = session.say("Again.", max_tokens=5, temperature=0)
    assert reply.usage.cached_tokens > 10 and len(session.messages) == 5


def test_a_bad_prompt_ends_its_batch(llm: llmkit.LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.generate(["Once"] * 6 + ["word " * 5000], max_tokens=9, ignore_eos=True)
    wait_for(lambda: llm.stats.num_running == llm.stats.num_waiting == 0)
    profile = llm.profile(prompt_tokens=(16,), batch_sizes=(1,), max_tokens=4)
    assert (profile.df[["ttft_s", "decode_tok_s"]] > 0).all().all()


def test_tables(llm: llmkit.LLM) -> None:
    import pandas as pd

    frame = pd.DataFrame({"text": [f"word {i}" for i in range(30)]})
    made = llm.map(frame, "Repeat: {text}", max_tokens=2, temperature=0)
    assert len(made) == 30 and made["answer_error"].isna().all()


def test_what_the_engine_does(llm: llmkit.LLM) -> None:
    monitor = llm.monitor(interval=0.25)
    stream = llm.stream("Once", max_tokens=900, ignore_eos=True)
    wait_for(lambda: monitor.sample().decode_tok_s > 0 and monitor.sample().requests)
    assert monitor.sample().rss_bytes is None and "on another host" in repr(monitor)
    assert "<svg" in monitor.html() and "KV of 'smollm2'" in repr(llm.kv_map())
    stream.close()
    wait_for(lambda: llm.stats.num_running == 0)
    monitor.stop()
    frame = llm.timeline().df
    assert len(frame) > 10 and frame.request.str.startswith(f"local-{os.getpid()}-").any()


def test_the_magics(llm: llmkit.LLM, capsys: pytest.CaptureFixture[str]) -> None:
    shell = InteractiveShell.instance()
    try:
        shell.run_line_magic("load_ext", "llmkit")
        shell.run_line_magic("llm", "list")
        assert "smollm2" in capsys.readouterr().out and kernel_id() is None
        shell.run_cell_magic("llm", "-n 4 -t 0 -r -m smollm2", "The capital of France is")
        assert "Paris" in capsys.readouterr().out
    finally:
        InteractiveShell.clear_instance()


def test_vectors(server: Served) -> None:
    here = llmkit.load("minilm", share=False)
    there = llmkit.attach(server.url, key=KEY, model="minilm")
    texts = ["A man is eating food.", "Someone eats a meal!", "x"]
    assert np.allclose(there.embed(texts), here.embed(texts), atol=1e-5)
    assert there.embed("x").shape == (384,)
    assert there.rerank("food", texts, top=2)[0][0] in (0, 1)
    many = there.embed([f"text {i}" for i in range(300)])
    assert many.shape == (300, 384)
    there.unload()
    here.unload()
