"""The main job, for real: a Jupyter server in a process, a kernel with the embedded model, the
stock openai client outside."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import wait_for
from jupyter_client_http import JupyterServer, Kernel

pytestmark = pytest.mark.model
LOAD = (
    "import llmkit; llm = llmkit.load('smollm2', n_ctx=1024, n_slots=4); import os; "
    "print(os.getpid())"
)
# Calls into C that keep the GIL: PyDLL does not release it.
SLEEP_HOLDING_GIL = "import ctypes; ctypes.PyDLL(None).usleep(3_000_000)"
MESSAGES: Any = [{"role": "user", "content": "Count from one to twenty."}]


def client(server: JupyterServer, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/llmkit/v1",
        api_key=server.token,
        max_retries=0,
        timeout=60,
        **options,
    )


def chat(server: JupyterServer, model: str = "default", max_tokens: int = 8, **options: Any) -> Any:
    return client(server).chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=max_tokens, temperature=0, **options
    )


def test_the_same_loaded_model_from_outside(server: JupyterServer, kernel: Kernel) -> None:
    with pytest.raises(openai.APIStatusError) as none_yet:
        chat(server)
    assert none_yet.value.status_code == 503 and "llmkit.load" in none_yet.value.message
    kernel.run(LOAD)
    inside = kernel.run(
        "print(llm.chat('Count from one to twenty.', max_tokens=24, temperature=0).text, end='')"
    )
    reply = chat(server, "smollm2", 24)
    streamed = list(
        chat(server, "smollm2", 24, stream=True, stream_options={"include_usage": True})
    )
    assert reply.choices[0].message.content == inside
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == inside
    assert streamed[-1].usage is not None and streamed[-1].usage.completion_tokens == 24
    assert reply.usage.prompt_tokens_details.cached_tokens > 0, (
        "the kernel's own prompt is a cached prefix for the gateway"
    )
    models = client(server).models.list().data
    assert [m.id for m in models] == ["smollm2"] and client(server).models.retrieve(
        "smollm2"
    ).id == "smollm2"
    assert chat(server, f"smollm2@{kernel.id}").choices[0].message.content
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(server, "gpt-7")
    assert unknown.value.code == "model_not_found"
    kernel.run("assert llm.stats.requests_total >= 3; llm.unload()")
    with pytest.raises(openai.APIStatusError) as gone:
        chat(server, "smollm2")
    assert gone.value.status_code == 503 and "unloaded" in gone.value.message


@pytest.mark.parametrize(
    "work",
    ["sum(range(1000))", "time.sleep(0.1)", "a @ a"],
    ids=["python", "sleep", "numpy"],
)
def test_a_busy_cell_does_not_block_a_request(
    server: JupyterServer, kernel: Kernel, tmp_path: Path, work: str
) -> None:
    """The cell goes on until the reply is there."""
    kernel.run(LOAD)
    chat(server)
    begun, done = tmp_path / "begun", tmp_path / "done"
    code = f"""import time, pathlib, numpy as np
a = np.random.rand(300, 300); end = time.time() + 100
pathlib.Path({str(begun)!r}).touch()
while not pathlib.Path({str(done)!r}).exists() and time.time() < end: {work}
print(time.time() < end)"""
    cell = kernel.start(code)
    wait_for(begun.exists)
    assert chat(server, max_tokens=12).usage.completion_tokens == 12
    assert kernel_is_busy(server, kernel)
    done.touch()
    assert kernel.wait(cell) == ("True\n", None)


def kernel_is_busy(server: JupyterServer, kernel: Kernel) -> bool:
    return bool(server.request("GET", f"/api/kernels/{kernel.id}")["execution_state"] == "busy")


def test_c_code_that_holds_the_gil_delays_a_request_only(
    server: JupyterServer, kernel: Kernel, tmp_path: Path
) -> None:
    kernel.run(LOAD)
    chat(server)
    begun = tmp_path / "begun"
    cell = kernel.start(f"open({str(begun)!r}, 'w').close(); {SLEEP_HOLDING_GIL}")
    wait_for(begun.exists)
    assert chat(server).usage.completion_tokens == 8
    assert kernel_is_busy(server, kernel) or kernel.wait(cell)[1] is None


def num_running(kernel: Kernel) -> int:
    models = kernel.server.request("GET", "/llmkit/status")["models"]
    return sum(m["num_running"] for m in models if m["kernel"] == kernel.id)


def test_stop_while_a_stream_from_outside_runs(server: JupyterServer, kernel: Kernel) -> None:
    """■ ends the notebook's own generation; the other process's stream goes on."""
    kernel.run(LOAD)
    with ThreadPoolExecutor(1) as pool:
        outside = pool.submit(lambda: chat(server, max_tokens=400, extra_body={"ignore_eos": True}))
        cell = kernel.start("llm.generate('Once', max_tokens=900, ignore_eos=True)")
        wait_for(lambda: num_running(kernel) == 2)
        kernel.interrupt()
        _, error = kernel.wait(cell)
        assert error is not None and "llm.last" in error and "ctypes" not in error
        assert outside.result(300).usage.completion_tokens == 400
    shown = (
        "print(c.finish_reason.value, c.usage.completion_tokens < 500, "
        "llm.generate('The', max_tokens=2).usage.completion_tokens)"
    )
    assert kernel.run(f"c = llm.last; {shown}").split() == ["abort", "True", "2"], (
        "it did not run on to its 900 tokens"
    )


def test_stop_in_prefill_and_in_a_loop(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD.replace("n_ctx=1024, n_slots=4", "n_ctx=4096, n_slots=1"))  # seconds of it
    for code in (
        "llm.generate('word and ' * 1900, max_tokens=5)",
        "for piece in llm.stream('a', max_tokens=900, ignore_eos=True): pass",
    ):
        cell = kernel.start(code)
        wait_for(lambda: num_running(kernel) == 1)
        kernel.interrupt()
        _, error = kernel.wait(cell)
        assert error is not None and "Interrupt" in error
        wait_for(lambda: num_running(kernel) == 0)
        assert kernel.run("print(llm.last.finish_reason.value)") == "abort\n"


def test_a_client_that_disconnects_frees_its_slot(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD)
    stream = chat(server, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    for _, _ in zip(range(5), stream, strict=False):
        pass
    assert kernel.run("print(llm.stats.num_running)").strip() == "1"
    stream.close()
    wait_for(lambda: kernel.run("print(llm.stats.num_running)").strip() == "0")


def test_break_out_of_a_stream_frees_its_slot(server: JupyterServer, kernel: Kernel) -> None:
    """In a cell, sync and async; IPython keeps the variables of the loop alive."""
    kernel.run(LOAD)
    loop = (
        "for piece in llm.stream('Once', max_tokens=900, ignore_eos=True):\n"
        "    if len(piece): break\nprint(piece != '')"
    )
    assert kernel.run(loop).strip() == "True"
    wait_for(lambda: kernel.run("print(llm.stats.num_running)").strip() == "0")
    assert kernel.run("async " + loop).strip() == "True"
    wait_for(lambda: kernel.run("print(llm.stats.num_running)").strip() == "0")
    assert chat(server).usage.completion_tokens == 8


def test_kill_9_mid_stream_then_restart(server: JupyterServer, kernel: Kernel) -> None:
    pid = int(kernel.run(LOAD))
    stream = chat(server, "smollm2", max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"ended|killed"):
        for _ in stream:
            pass
    with pytest.raises(openai.APIStatusError) as gone:
        chat(server, "smollm2")
    assert gone.value.status_code == 503 and "Load" in gone.value.message
    assert gone.value.response.headers["retry-after"]
    wait_for(
        lambda: (
            server.request("GET", f"/api/kernels/{kernel.id}")["execution_state"]
            in ("idle", "starting", "busy", "restarting")
        )
    )
    kernel.restart()
    kernel.run(LOAD)
    assert chat(server, "smollm2").usage.completion_tokens == 8
    assert not list(server.runtime.glob(f"llmkit-{pid}-*")), "the dead engine's file is gone"


def test_restart_while_generating(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD)
    kernel.start("llm.generate('Once', max_tokens=900, ignore_eos=True)")
    wait_for(lambda: num_running(kernel) == 1)
    kernel.restart()
    assert kernel.run("print('back')").strip() == "back"
    with pytest.raises(openai.APIStatusError) as gone:
        chat(server, "smollm2")
    assert gone.value.status_code == 503


def test_two_kernels_with_the_same_model(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD)
    second = server.kernel()
    try:
        second.run(LOAD)
        ids = [m.id for m in client(server).models.list().data]
        assert ids == ["smollm2", f"smollm2@{kernel.id}"]
        chat(server, "smollm2")
        assert second.run("print(llm.stats.requests_total)").strip() == "1", (
            "the newest has the plain name"
        )
        chat(server, f"smollm2@{kernel.id}")
        assert kernel.run("print(llm.stats.requests_total)").strip() == "1"
    finally:
        second.close()
        server.request("DELETE", f"/api/kernels/{second.id}")
    assert chat(server, "smollm2").usage.completion_tokens == 8, (
        "the older engine takes the name over"
    )


def test_a_second_server_sees_its_own_kernels_only(
    server: JupyterServer, kernel: Kernel, tmp_path: Path
) -> None:
    kernel.run(LOAD)
    other = JupyterServer(
        tmp_path, "--ServerApp.allow_origin=", runtime=server.runtime, base_url="/user/me/"
    )
    try:
        assert client(other).models.list().data == []
        with pytest.raises(openai.APIStatusError) as none:
            chat(other, "smollm2")
        assert none.value.status_code == 503
        assert chat(server, "smollm2").usage.completion_tokens == 8
    finally:
        other.stop()


def test_serve_in_jupyter_names_the_servers_gateway(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD)
    shown = kernel.run("e = llm.serve(); print(e.in_jupyter, e.url, e)")
    assert shown.startswith("True") and "/llmkit/v1" in shown
    assert server.token not in shown, "the secret is not shown"
    code = "import subprocess, sys, os; v = {**os.environ, **e.environment}\n"
    code += (
        "print(subprocess.run([sys.executable, '-c', e.python], env=v, capture_output=True, "
        "text=True))"
    )
    assert "returncode=0" in kernel.run(code)


def last_activity(server: JupyterServer, kernel: Kernel) -> str:
    return str(server.request("GET", f"/api/kernels/{kernel.id}")["last_activity"])


def test_being_used_is_activity(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(LOAD)
    before = last_activity(server, kernel)
    chat(server)
    assert last_activity(server, kernel) > before


def test_a_long_stream_is_activity_all_along(server: JupyterServer, kernel: Kernel) -> None:
    """Else a server that culls idle kernels ends one in the middle of an answer."""
    kernel.run(LOAD)
    stream = chat(server, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    begun = last_activity(server, kernel)
    for _ in stream:
        if last_activity(server, kernel) > begun:
            break
    else:
        pytest.fail("the stream ended, and the kernel was idle all the time")
    stream.close()
