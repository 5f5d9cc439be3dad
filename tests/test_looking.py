"""What a notebook shows of an engine: timeline, KV map, perplexity, comparison, chat panel,
progress."""

from __future__ import annotations

import datetime
import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pytest
from fakes import FakeClient, ask, wait_for

import llmkit
from llmkit.bench.comparing import Comparison
from llmkit.bench.quality import SAMPLE_TEXT
from llmkit.errors import EngineGoneError, InvalidRequestError
from llmkit.notebook import progress
from llmkit.notebook.monitor import ELSEWHERE, GpuMemory, Monitor, watch
from llmkit.notebook.panel import ChatPanel, as_html
from llmkit.protocol import Origin

matplotlib.use("agg")
pytestmark = pytest.mark.model
SHARED = "You are an assistant who knows a great many things about animals and plants. " * 6


@pytest.fixture(scope="module")
def llm() -> Iterator[llmkit.LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
        handle = llmkit.load("smollm2", n_ctx=1024, n_slots=4, share=False)
    yield handle
    handle.unload()


def test_the_timeline_tells_every_token(llm: llmkit.LLM) -> None:
    before = len(llm.timeline().df)
    done = llm.generate(
        [f"{SHARED} Tell {i}:" for i in range(4)], max_tokens=10, temperature=0, speculate=False
    )
    timeline = llm.timeline()
    new = timeline.df.iloc[before:]
    assert new.tokens.sum() == sum(
        c.usage.prompt_tokens - c.usage.cached_tokens + c.usage.completion_tokens - 1 for c in done
    )
    assert (
        new.is_prompt.any()
        and new.groupby("step").size().max() == 4
        and (new.seconds > 0).all()
        and new.at_s.is_monotonic_increasing
    )
    assert set(new.slot) == {0, 1, 2, 3} and new.request.nunique() == 4
    axes = timeline.plot()
    assert axes.get_ylabel() == "slot" and len(axes.collections) >= 4
    assert timeline._repr_png_()[:4] == b"\x89PNG" and "4 slots in a step" in repr(timeline)
    assert len(llm.timeline(seconds=0.0001).df) <= 4


def test_the_map_shows_what_slots_share(llm: llmkit.LLM) -> None:
    llm.generate([f"{SHARED} Tell {i}:" for i in range(4)], max_tokens=4, temperature=0)
    shown = llm.kv_map()
    assert (
        (shown.df.shared > 50).sum() == 3
        and shown.df.request.isna().all()
        and (shown.df.tokens > shown.df.shared).all()
    )
    assert "cached" in repr(shown) and shown._repr_html_().count("<svg") == 4
    stream = llm.stream("Once", max_tokens=900, ignore_eos=True)
    wait_for(lambda: llm.kv_map().df.request.notna().sum() == 1)
    assert "running" in repr(llm.kv_map())
    stream.close()


def test_perplexity_is_that_of_the_logprobs(llm: llmkit.LLM) -> None:
    done = llm.generate(SAMPLE_TEXT, max_tokens=0, prompt_logprobs=0)
    expected = math.exp(-np.mean([e.logprob for e in done.prompt_logprobs[1:]]))
    assert llm.perplexity(SAMPLE_TEXT) == pytest.approx(expected, rel=1e-3)
    windows = llm.perplexity(SAMPLE_TEXT, n_ctx=64)
    assert expected < windows < 2 * expected < llm.perplexity("qwe zxc asd lkj poi mnb 31 ,, x")
    long = llm.perplexity(SAMPLE_TEXT * 3)
    assert long < expected, "a text that repeats itself surprises less"
    with pytest.raises(InvalidRequestError):
        llm.perplexity("")


def test_models_beside_each_other(llm: llmkit.LLM) -> None:
    other = str(llmkit.quantize("smollm2", "Q4_0"))
    df = llmkit.compare(["smollm2", other], batch_size=4, prompt_tokens=32).df
    assert df.loc["smollm2", "perplexity"] == pytest.approx(llm.perplexity(SAMPLE_TEXT), rel=0.01)
    assert df.loc["smollm2", "agreement"] == 1 and 0.5 < df.loc[other, "agreement"] < 1, (
        "weights made rougher choose otherwise here and there"
    )
    assert df.loc[other, "perplexity"] != df.loc["smollm2", "perplexity"] and list(
        df["quantization"]
    ) == ["Q4_1", "Q4_0"]
    assert not llm.closed and list(llmkit.models) == ["smollm2"], (
        "what was loaded stays, what was loaded for this is gone"
    )
    rows = [
        {
            "model": n,
            "decode_tok_s": 1.0,
            "prefill_tok_s": 2.0,
            "weights_mb": 3.0,
            "perplexity": 4.0,
        }
        for n in ("a", "b")
    ]
    assert (
        Comparison(rows).plot().get_title() == "perplexity"
        and "<table" in Comparison(rows)._repr_html_()
    )
    for bad in ("smollm2", []):
        with pytest.raises(InvalidRequestError, match="list"):
            llmkit.compare(bad)


def test_tokens_by_probability(llm: llmkit.LLM) -> None:
    done = llm.generate("The capital of France is", max_tokens=5, temperature=0, logprobs=2)
    shown = llm.show_tokens(done)._repr_html_()
    assert shown.count("<span") == 5 and "Paris" in re.sub("<[^>]*>", "", shown)
    with pytest.raises(InvalidRequestError, match="logprobs"):
        llm.show_tokens(llm.generate("x", max_tokens=1))


@pytest.fixture
def panel(llm: llmkit.LLM) -> ChatPanel:
    panel = llm.chat_panel("Answer briefly.", temperature=0, max_tokens=30)
    panel._repr_mimebundle_()
    return panel


def value(panel: ChatPanel, name: str) -> Any:
    assert panel._widgets is not None
    return panel._widgets[name]


def test_a_panel_sends_and_streams_without_blocking(panel: ChatPanel, llm: llmkit.LLM) -> None:
    value(panel, "box").value = "Name a fruit. <b>"
    value(panel, "send").click()
    assert value(panel, "box").value == ""
    panel.wait(30)
    (_, question, answer) = panel.session.messages
    assert (
        question.content == "Name a fruit. <b>"
        and answer.content
        and "&lt;b&gt;" in value(panel, "log").value
    )
    assert (
        not value(panel, "send").disabled
        and value(panel, "stop").disabled
        and "answer complete" in value(panel, "state").value
    )
    assert answer.content in repr(panel)


def test_a_panel_stops_edits_and_clears(panel: ChatPanel) -> None:
    panel.session.sampling |= {"max_tokens": 600, "ignore_eos": True}
    panel.send("Tell a very long story.")
    wait_for(lambda: re.search(r"\w ▍", value(panel, "coming").value))
    assert value(panel, "send").disabled
    panel.send("ignored while busy")
    value(panel, "stop").click()
    panel.wait(30)
    assert not panel.busy and panel.session.num_turns == 1 and panel.session.messages[-1].content
    value(panel, "edit").click()
    assert value(panel, "box").value == "Tell a very long story." and panel.session.num_turns == 0
    panel.send("x " * 3000)
    assert (
        "context" in value(panel, "coming").value and not panel.busy and value(panel, "box").value
    ), "what was typed is not lost"
    assert panel.edit().startswith("x x") and "context" not in value(panel, "coming").value
    panel.clear()
    assert [m.role for m in panel.session.messages] == ["system"] and "Say something" in value(
        panel, "log"
    ).value


def test_a_panel_loses_nothing_that_is_not_sent(fake: FakeClient) -> None:
    llm = llmkit.LLM(fake)
    fake.description = replace(fake.description, inputs=("image",))
    panel = ChatPanel(llm.session(max_tokens=2), "fake", sees=True)
    panel._repr_mimebundle_()
    upload = next(
        each
        for row in value(panel, "panel").children
        for each in getattr(row, "children", ())
        if getattr(each, "description", "") == "Picture"
    )
    sent: list[Any] = []
    panel.send = lambda text, images=(): sent.append((text, images))  # type: ignore[method-assign]
    chosen = {
        "name": "a.png",
        "type": "image/png",
        "size": 1,
        "content": memoryview(b"x"),
        "last_modified": datetime.datetime.now(datetime.UTC),
    }
    upload.value = [chosen]
    value(panel, "send").click()
    value(panel, "box").value = "Look."
    panel._turn = object()  # type: ignore[assignment]  # an answer is coming
    value(panel, "send").click()
    assert not sent and len(upload.value) == 1 and value(panel, "box").value == "Look."
    panel._turn = None
    value(panel, "send").click()
    assert sent == [("Look.", [b"x"])] and not upload.value and value(panel, "box").value == ""
    llm.unload()


def test_a_panel_starts_over_without_waiting(fake: FakeClient) -> None:
    gate, execute = threading.Event(), fake.runner.execute
    gate.set()

    def gated(batch: Any) -> Any:
        gate.wait(60)
        return execute(batch)

    fake.runner.execute = gated  # type: ignore[method-assign]
    llm = llmkit.LLM(fake)
    expected = llm.session("Be brief.", temperature=0, max_tokens=20).say("two").text
    panel = llm.chat_panel("Be brief.", temperature=0, max_tokens=200)
    panel.send("one")
    wait_for(lambda: panel._turn is not None and panel._turn.text)
    gate.clear()  # a step that does not end
    dropped, started = panel._thread, time.monotonic()
    panel.clear()
    assert time.monotonic() - started < 30 and not panel.busy
    assert [m.role for m in panel.session.messages] == ["system"]
    panel.session.sampling["max_tokens"] = 20
    panel.send("two")
    assert panel.busy
    gate.set()
    panel.wait(30)
    assert dropped is not None
    dropped.join(30)
    assert not dropped.is_alive() and not panel.busy
    assert [m.text for m in panel.session.messages] == ["Be brief.", "two", expected]


def test_markdown_is_shown_and_html_is_not() -> None:
    shown = as_html(
        "**bold** <script>alert(1)</script> [x](javascript:alert(1))\n\n```python\na < b\n```"
    )
    assert (
        "<img" not in as_html("![x](https://evil.example/?q=1)")
        and "<a" not in as_html("[a](/api/x)")
        and 'rel="noopener' in as_html("[a](https://b.c)")
    )
    assert (
        "<strong>bold</strong>" in shown
        and "<script" not in shown
        and "href" not in shown
        and "a &lt; b" in shown
    )


def test_progress_is_quiet_at_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "PATIENCE_S", 60.0)
    bar = progress.Progress("work", 10)
    bar.update(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    bar.update(5, "half")
    assert "work:  50% half" in capsys.readouterr().err
    bar.close()


def test_a_load_tells_how_far_it_is() -> None:
    from llmkit.backend.model import LlamaModel
    from llmkit.models.registry import resolve

    heard: list[float] = []
    LlamaModel(resolve("gemma3-270m").path, n_gpu_layers=0, on_progress=heard.append).close()
    assert heard and all(0 <= share <= 1 for share in heard) and heard == sorted(heard)


def test_the_monitor_shows_each_request(llm: llmkit.LLM) -> None:
    monitor = llm.monitor(interval=0.25)
    stream = llm.stream("Once upon a time", max_tokens=900, ignore_eos=True, caller="<me>")
    wait_for(lambda: bool(monitor.sample().requests))
    (request,) = monitor.sample().requests
    assert (request.caller, request.prompt_tokens) == ("<me>", 4) and request.seconds > 0
    assert "&lt;me&gt;" in monitor.html() and "prompt cache" in monitor.html()
    stream.close()
    wait_for(lambda: not monitor.sample().requests)
    monitor.stop()


def test_the_monitor_of_a_model_that_ends_elsewhere_says_so() -> None:
    client = FakeClient()
    monitor = Monitor(client, interval=0.25)
    monitor._repr_mimebundle_()
    assert ">live<" in monitor._widget.value
    client.runner.crash_next = True
    with pytest.raises(EngineGoneError):
        client.submit(ask("x")).result(30)
    wait_for(lambda: ">stopped<" in monitor._widget.value)
    assert not monitor.running and "stopped" in repr(monitor)
    client.close()


def test_the_monitor_splits_the_memory_of_a_gpu(fake: FakeClient) -> None:
    mib = 1 << 20
    sizes = {"weights": 92 * mib, "kv": 90 * mib, "compute": 98 * mib}
    fake.description = replace(
        fake.description,
        weights_bytes=120 * mib,
        kv_bytes=90 * mib,
        compute_bytes=100 * mib,
        device_bytes=sizes,
    )
    monitor = Monitor(fake, gpus=lambda: [GpuMemory("CUDA0", 400 * mib, 1000 * mib)])
    monitor.stop()
    ram, vram = monitor.html().split("VRAM", 1)
    assert (
        "weights 28 MiB" in ram and "compute 2.0 MiB" in ram and "KV" not in ram.split(">RAM<")[1]
    )
    assert all(
        text in vram
        for text in (
            "400 MiB of 1000 MiB",
            "weights 92 MiB",
            "KV 90 MiB",
            "compute 98 MiB",
            "others 120 MiB",
        )
    )


@pytest.mark.parametrize(
    "origin", [Origin("url", url="https://elsewhere/llmkit"), Origin("host", 1, host="elsewhere")]
)
def test_the_monitor_leaves_out_the_memory_of_another_host(
    monkeypatch: pytest.MonkeyPatch, fake: FakeClient, origin: Origin
) -> None:
    monkeypatch.setattr(FakeClient, "origin", origin)
    monitor = watch(fake, 0.5)
    monitor.stop()
    assert monitor.sample().rss_bytes is None and monitor.sample().vram is None
    for shown in (monitor.html(), repr(monitor)):
        assert ELSEWHERE in shown and "RAM" not in shown and "CPU only" not in shown
