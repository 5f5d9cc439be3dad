"""The device checks: each runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device_words import (
    MIB,
    ROOT,
    Row,
    Skipped,
    driver_settled,
    driver_used,
    mib,
    row,
    skipped,
    smi,
)

SLACK = 64 * MIB  # drivers allocate in blocks


def vram(options: dict[str, Any]) -> Iterator[Row]:
    """The estimate against the driver, for one setting."""
    import llmkit

    setting, expected = options["setting"], "within 10 % or 64 MiB"
    what = "VRAM estimate, " + ", ".join(f"{k}={v}" for k, v in setting.items())
    try:
        idle = driver_used()
    except Skipped as why:
        guess = llmkit.estimate(options["model"], **setting)
        yield skipped(what, expected, f"{why}; in RAM: {mib(guess.total_bytes)} estimated")
        return
    guess = llmkit.estimate(options["model"], **setting)  # creates this process's CUDA context
    before = driver_used()
    with llmkit.load(options["model"], share=False, **setting) as llm:
        llm.generate("a b c d", max_tokens=8)
        taken = driver_used() - before
        buffers = sum(llm.model.device_bytes.values())
    measured = (
        f"{mib(guess.gpu_bytes)} estimated, {mib(taken)} taken ({guess.gpu_bytes / taken:.2f}×), "
        f"llama.cpp's buffers {mib(buffers)}, CUDA context {mib(before - idle)} more"
    )
    near = abs(guess.gpu_bytes - taken) <= max(SLACK, taken // 10)
    yield row(what, expected, measured, near)


def auto(options: dict[str, Any]) -> Iterator[Row]:
    """All layers on an empty GPU; fewer on one that another process has filled."""
    import llmkit
    from llmkit.models import gguf
    from llmkit.models.registry import resolve

    layers = gguf.read_header(resolve(options["model"]).path).integer("block_count") + 1
    setting = {"n_ctx": options["n_ctx"], "n_slots": options["n_slots"]}
    first, second = 'n_gpu_layers="auto"', "the same, VRAM taken by another process"
    everything, fewer = f"all {layers} layers", f"1–{layers - 1} layers, and it generates"
    if smi("name") is None:
        with llmkit.load(options["model"], share=False, **setting) as llm:
            text = f"no GPU: loaded on the {llm.model.device}"
            yield skipped(first, everything, text)
        yield skipped(second, fewer, "no GPU")
        return
    guess = llmkit.estimate(options["model"], **setting)
    with llmkit.load(options["model"], share=False, **setting) as llm:
        llm.generate("a b c d", max_tokens=4)
        on_gpu = llm.model.device == "gpu" and guess.n_gpu_layers == layers
        text = f"{guess.n_gpu_layers} of {layers}, device {llm.model.device}"
        yield row(first, everything, text, on_gpu)
    free = llmkit.estimate(options["model"], **setting).gpu_free_bytes or 0
    context = 700 * MIB  # the other process's own
    with ballast(free - context - int(0.6 * guess.gpu_bytes) - 100 * MIB) as held:
        now = llmkit.estimate(options["model"], **setting)
        with llmkit.load(options["model"], share=False, **setting) as llm:
            done = llm.generate("a b c d", max_tokens=4)
        text = (
            f"{mib(held)} taken, {mib(now.gpu_free_bytes or 0)} free: {now.n_gpu_layers} of "
            f"{layers}, {done.usage.completion_tokens} tokens generated"
        )
        yield row(second, fewer, text, 0 < now.n_gpu_layers < layers)


@contextlib.contextmanager
def ballast(size: int) -> Iterator[int]:
    """Another process that holds ``size`` bytes of VRAM."""
    command = [sys.executable, str(ROOT / "benchmarks" / "device_check.py"), "hold", str(size)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        said = holder.stdout.readline().strip()
        if said != "held":
            raise Skipped(f"the ballast of {mib(size)} could not be allocated: {said or 'died'}")
        yield size
    finally:
        holder.stdin.close()
        holder.wait(20)


def hold(size: int) -> int:
    """Allocate VRAM by the driver's library alone, until standard input closes."""
    import ctypes

    cuda = ctypes.CDLL("libcuda.so.1")
    context, place, device = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
    calls: list[Callable[[], int]] = [
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        lambda: cuda.cuCtxSetCurrent(context),
        lambda: cuda.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(size)),
    ]
    for n, call in enumerate(calls):
        if code := call():
            print(f"CUDA error {code} in step {n}", flush=True)
            return 1
    print("held", flush=True)
    sys.stdin.read()
    return 0


def release(options: dict[str, Any]) -> Iterator[Row]:
    """Memory comes back after unload(), and after the death of the model's process."""
    import psutil

    import llmkit

    setting = {"n_ctx": options["n_ctx"], "n_slots": options["n_slots"], "share": False}
    gpu = smi("name") is not None
    unit = "VRAM" if gpu else "RAM (no GPU)"

    def used() -> int:
        return driver_used() if gpu else int(psutil.Process().memory_info().rss)

    llmkit.estimate(options["model"])
    with llmkit.load(options["model"], **setting) as llm:  # what stays for good: context, libraries
        llm.generate("a b c d", max_tokens=4)
    before = used()
    with llmkit.load(options["model"], **setting) as llm:
        llm.generate("a b c d", max_tokens=4)
        during = used()
        begin = time.monotonic()
    took = time.monotonic() - begin
    after = driver_settled(before + SLACK) if gpu else used()
    text = f"{mib(during - before)} taken, {mib(after - before)} left, {took:.2f} s"
    yield row(f"{unit} after unload()", "back to within 64 MiB", text, after <= before + SLACK)

    before = used()
    llm = llmkit.load(options["model"], isolated=True, **setting)
    stream = llm.stream("a b c d", max_tokens=400, ignore_eos=True)
    next(iter(stream))
    during, pid = used(), llm.engine.origin.pid
    assert pid is not None and pid != os.getpid()
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    try:
        stream.result(10)
        end = "the request finished"
    except Exception as error:
        end = type(error).__name__
    took = time.monotonic() - begin
    text = f"{end} after {took:.2f} s; gone: {llm.closed}"
    ok = llm.closed and took < 2 and end.endswith("Error")
    yield row("kill -9 of the model's process", "an error within 2 s, this process lives", text, ok)
    what, expected = "VRAM after kill -9", "back to within 64 MiB"
    if gpu:
        after = driver_settled(before + SLACK, 10)
        took = time.monotonic() - begin
        text = f"{mib(during - before)} taken, {mib(after - before)} left after {took:.1f} s"
        yield row(what, expected, text, after <= before + SLACK)
    else:
        yield skipped(what, expected, "no GPU")
    llm.unload()


def stop(options: dict[str, Any]) -> Iterator[Row]:
    """A long prompt, stopped in the middle of its prefill."""
    import llmkit
    from llmkit.bench.prompts import prompt_text

    words = options["words"]
    longest, phases = 0.0, []
    with llmkit.load(options["model"], n_ctx=options["n_ctx"], n_slots=1, share=False) as llm:
        for n in range(options["times"]):
            stream = llm.stream(prompt_text(7, n, words), max_tokens=4)
            time.sleep(options["after_s"])
            early = not stream.text and not stream.finished
            begin = time.monotonic()
            stream.close()
            while not stream.finished or llm.stats.num_running or llm.stats.num_waiting:
                if time.monotonic() > begin + 20:
                    break
                time.sleep(0.002)
            longest = max(longest, time.monotonic() - begin)
            phases.append(early)
    text = f"at most {longest:.3f} s of {len(phases)}, {sum(phases)} of them in the prefill"
    ok = longest <= 0.3 if all(phases) else None if longest <= 0.3 else False
    yield row(f"stop in a prefill of {words} words", "idle within 0.3 s", text, ok)


def monitor(options: dict[str, Any]) -> Iterator[Row]:
    """The monitor's VRAM against the driver's."""
    import llmkit

    what, expected = "the monitor's VRAM", "the driver's, within 64 MiB"
    setting = {"n_ctx": options["n_ctx"], "n_slots": options["n_slots"]}
    with llmkit.load(options["model"], share=False, **setting) as llm:
        llm.generate("a b c d", max_tokens=8)
        panel = llm.monitor(0.25)
        time.sleep(0.6)
        sample = panel.sample()
        try:
            real = driver_used()
        except Skipped as why:
            yield skipped(what, expected, f"{why}; the panel says {sample.vram}")
            return
        if sample.vram is None:
            yield row(what, expected, "it shows none", False)
            return
        text = f"{mib(sample.vram[0])} shown, {mib(real)} by nvidia-smi"
        yield row(what, expected, text, abs(sample.vram[0] - real) <= SLACK)


def speed(options: dict[str, Any]) -> Iterator[Row]:
    """Tokens per second of our engine and llama-server, in turns."""
    gpu, place = smi("name") is not None, (options["n_ctx"], options["n_slots"])
    binary = options["server"]
    with contextlib.ExitStack() as ends:
        ours = engine_arm(options["model"], *place, options["threads"], ends)
        theirs = None
        if binary is not None:
            layers = "99" if gpu else "0"
            try:
                theirs = server_arm(
                    binary, options["path"], *place, options["threads"], layers, ends
                )
            except RuntimeError as error:
                options["no_server"] = str(error)
                yield row("llama-server starts", "it answers", str(error), False)
        for arm in (ours, theirs):
            if arm is not None:
                arm(job(1, 1, options, seed=1))  # warm-up
        for clients in options["clients"]:
            results: dict[str, list[float]] = {"llmkit": [], "llama-server": []}
            failed = 0
            for turn in range(options["turns"]):
                arms = [("llmkit", ours), ("llama-server", theirs)]
                for n, (name, arm) in enumerate(arms if turn % 2 == 0 else arms[::-1]):
                    if arm is not None:
                        seed = 1000 * clients + 10 * turn + n + 2
                        said = arm(job(clients, max(3, 2 * clients), options, seed=seed))
                        results[name].append(said["tok_s"])
                        failed += said["errors"]
            mine, peer = (middle(results[name]) for name in ("llmkit", "llama-server"))
            what, expected = f"tokens/s, {clients} clients", "≥ 1.00× llama-server"
            if not peer:
                text = f"{mine:.0f}; llama-server: {options['no_server']}"
                yield row(what, expected, text, False if failed else None)
                continue
            text = f"{mine:.0f} against {peer:.0f}: {mine / peer:.2f}×"
            ok = not failed and (mine >= 0.995 * peer if gpu else None)
            yield row(what, expected, text + (f", {failed} failed" if failed else ""), ok)


def middle(values: list[float]) -> float:
    """The median, of an even count the lower of the two; 0 of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


def job(clients: int, requests: int, options: dict[str, Any], seed: int) -> dict[str, int]:
    sizes = {name: options[name] for name in ("prompt_words", "max_tokens")}
    return {"concurrency": clients, "requests": requests, "seed": seed, **sizes}


Measure = Callable[[dict[str, int]], dict[str, Any]]


def engine_arm(
    model: str, n_ctx: int, n_slots: int, threads: int, ends: contextlib.ExitStack
) -> Measure:
    settings = {"model": model, "n_ctx": n_ctx, "n_slots": n_slots, "threads": threads}
    command = [sys.executable, str(ROOT / "benchmarks" / "engine_arm.py"), json.dumps(settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ends.callback(process.wait, 30)
    assert process.stdin is not None and process.stdout is not None
    lines, answers = process.stdin, process.stdout
    ends.callback(lines.close)
    if answers.readline() != "ready\n":
        raise RuntimeError("the engine did not start")

    def measure(work: dict[str, int]) -> dict[str, Any]:
        lines.write(json.dumps(work) + "\n")
        lines.flush()
        return dict(json.loads(answers.readline()))

    return measure


def server_arm(
    binary: str,
    model: str,
    n_ctx: int,
    n_slots: int,
    threads: int,
    layers: str,
    ends: contextlib.ExitStack,
) -> Measure:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    command = [binary, "--host", "127.0.0.1", "--port", str(port), "-m", model, "--no-ui"]
    command += ["-c", str(n_ctx * n_slots), "-np", str(n_slots), "-ngl", layers, "-fa", "on"]
    command += ["-t", str(threads), "-tb", str(threads), "-no-kvu"]
    paths = [str(Path(binary).parent), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(p for p in paths if p)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, **quiet)
    ends.callback(process.wait, 20)
    ends.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            break
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with status {process.returncode}")
        time.sleep(0.1)
    else:
        raise RuntimeError("llama-server did not answer in a minute")

    def measure(work: dict[str, int]) -> dict[str, Any]:
        command = [sys.executable, "-m", "llmkit", "bench", "--json", "--base-url", f"{url}/v1"]
        for name, value in {**work, "api_key": "none"}.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        return dict(json.loads(told.stdout))

    return measure
