"""Pictures in chat, beside llama-server: an encoder of SmolVLM's size for the embedded model.

stall    the longest gap of a running stream while another request's picture is encoded and read
clients  how long eight requests at once take, each with a picture of its own
turns    how long ten turns over one picture take, and the first of them
--text   tokens a second of text alone, in a gateway with a projector and in one without, in turn

The weights are random: what is answered means nothing, and costs what it would.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arms import ServerArm, gateway_arm, llama_arm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import media_models
from media_parts import png

SIDE = 512
QUIET_S = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peer", action="store_true", help="without llama-server")
    parser.add_argument("--text", action="store_true", help="only what text loses, or does not")
    args = parser.parse_args()
    from llmkit.models.registry import resolve

    model = str(resolve(args.model).path)
    threads = str(args.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        projector = media_models.write_vision(
            Path(folder) / "mmproj.gguf",
            "gemma3",
            n_embd=media_models.width_of(Path(model)),
            sizes=media_models.SIGLIP,
            dtype=np.float16,
            scale=0.02,
        )
        ours = ["--n-ctx", "1024", "--n-slots", "4", "--threads", threads]
        theirs = ["-c", "4096", "-np", "4", "-t", threads, "-tb", threads, "-fa", "on"]
        arms = [gateway_arm(model, *ours, "--projector", str(projector))]
        running.callback(arms[0].close)
        if args.text:
            without = gateway_arm(model, *ours)
            running.callback(without.close)
            compare_text(arms[0], without, args.reps)
            return 0
        if not args.no_peer:
            arms.append(llama_arm(model, "-no-kvu", *theirs, "-no-kvu", "--mmproj", str(projector)))
            running.callback(arms[1].close)
        seeds = iter(range(1, 10_000))
        found: dict[str, list[dict[str, float]]] = {arm.label: [] for arm in arms}
        for _ in range(args.reps):
            for arm in arms:
                found[arm.label].append(measured(arm, seeds))
    for label, runs in found.items():
        print(label)
        for name in runs[0]:
            values = [run[name] for run in runs]
            print(f"  {name:32} {statistics.median(values):8.2f}   {sorted(values)}")
    return 0


def compare_text(seeing: ServerArm, blind: ServerArm, reps: int) -> None:
    ratios = []
    for rep in range(reps + 1):
        order = [seeing, blind] if rep % 2 else [blind, seeing]
        speed = {arm.base_url: tokens_per_s(arm, f"Round {rep}:") for arm in order}
        if rep:  # the first warms up
            ratios.append(speed[seeing.base_url] / speed[blind.base_url])
    print(f"text with a projector / without: {statistics.median(ratios):.3f}", end="   ")
    print([round(ratio, 3) for ratio in sorted(ratios)])


def tokens_per_s(arm: ServerArm, mark: str) -> float:
    """Of four requests at once."""
    began = time.perf_counter()

    def ask(number: int) -> None:
        list(chat(arm, f"{mark} story {number}", max_tokens=200, ignore_eos=True))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 800 / (time.perf_counter() - began)


def measured(arm: ServerArm, seeds: Iterator[int]) -> dict[str, float]:
    """Figures of one run, in seconds."""
    list(chat(arm, "hello", max_tokens=4))
    return {**stall(arm, png(next(seeds), SIDE)), **clients(arm, seeds), **turns(arm, next(seeds))}


def stall(arm: ServerArm, picture: bytes) -> dict[str, float]:
    times: list[float] = []
    ended = threading.Event()

    def read() -> None:
        for _ in chat(arm, "Tell a long story.", max_tokens=900, ignore_eos=True):
            times.append(time.perf_counter())
            if ended.is_set():
                return

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(QUIET_S)
    began = time.perf_counter()
    first = next(chat(arm, "What is it?", picture, max_tokens=4))
    until = time.perf_counter()
    time.sleep(0.5)
    ended.set()
    reader.join()
    at, gaps = np.array(times[1:]), np.diff(times)
    quiet = (at > began - QUIET_S / 2) & (at < began)
    beside = (at > began) & (at - gaps < until)  # a gap that ends with the picture's answer counts
    return {
        "stall: longest gap": float(gaps[beside].max()),
        "stall: median gap": float(np.median(gaps[beside])),
        "stall: median gap without it": float(np.median(gaps[quiet])),
        "stall: first token of the picture": first - began,
    }


def clients(arm: ServerArm, seeds: Iterator[int]) -> dict[str, float]:
    firsts: list[float] = []
    began = time.perf_counter()

    def ask(picture: bytes) -> None:
        answer = list(chat(arm, "What is it?", picture, max_tokens=16, ignore_eos=True))
        firsts.append(answer[0] - began)

    threads = [threading.Thread(target=ask, args=(png(next(seeds), SIDE),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "clients: all done": time.perf_counter() - began,
        "clients: median first token": statistics.median(firsts),
    }


def turns(arm: ServerArm, seed: int) -> dict[str, float]:
    picture, messages, took = png(seed, SIDE), [], []
    for turn in range(10):
        began = time.perf_counter()
        said = content(f"Turn {turn}.", picture if turn == 0 else None)
        messages.append({"role": "user", "content": said})
        list(chat(arm, "", messages=messages, max_tokens=8, ignore_eos=True))
        messages.append({"role": "assistant", "content": "I see."})
        took.append(time.perf_counter() - began)
    return {"turns: the first": took[0], "turns: a later one": statistics.median(took[1:])}


def content(text: str, picture: bytes | None) -> Any:
    if picture is None:
        return text
    address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = {"type": "image_url", "image_url": {"url": address}}
    return [{"type": "text", "text": text}, image]


def chat(arm: ServerArm, text: str, picture: bytes | None = None, **body: Any) -> Iterator[float]:
    """When each piece of the answer came."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": content(text, picture)}],
        "stream": True,
        "temperature": 0,
        **body,
    }
    request = urllib.request.Request(
        f"{arm.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {arm.key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    yield time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
