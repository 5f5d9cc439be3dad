"""From the start of a process to its first token: `llmkit serve`, `llmkit.load()`, llama-server.

In turns, each with the same file, context and slots; medians of ``--reps`` rounds, and ratios to
llama-server within a round. A first round is not counted: it reads the files from disk, and Python
keeps the bytecode, as pip does when it installs. With ``--against CHECKOUT`` the other side is
`llmkit serve` of another working tree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import arms
import peer

from llmkit.models.registry import resolve

LOAD = """
import llmkit
with llmkit.load({model!r}, n_ctx={n_ctx}, n_slots={n_slots}) as llm:
    for piece in llm.stream("Hello", max_tokens=4):
        print("first", flush=True)
        break
"""
QUESTION = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}


def first_token(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for the first text of an answer."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(
        url, json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
    )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                for line in reply:
                    if line.startswith(b"data: {"):
                        choices = json.loads(line[6:]).get("choices") or [{}]
                        if choices[0].get("delta", {}).get("content"):
                            return
        except (OSError, ValueError):
            time.sleep(0.01)  # not there yet, or not ready
    raise RuntimeError(f"the server ended with status {process.returncode}")


def served(
    command: list[str], port: int, environment: dict[str, str], folder: Path = arms.ROOT
) -> float:
    """Seconds to the first text; Python finds llmkit in ``folder``, where the command runs."""
    began = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, cwd=folder, **quiet)  # type: ignore[call-overload]
    try:
        first_token(port, process)
        return time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(30)


def loaded(code: str, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"first\n":
            raise RuntimeError("load() gave no token")
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reps", type=int, default=7, help="rounds")
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--n-slots", type=int, default=4)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="not llama-server")
    given = parser.parse_args()
    path, n_ctx, n_slots = resolve(given.model).path, given.n_ctx, given.n_slots
    rival = "llama-server" if given.against is None else str(given.against)
    tree = arms.ROOT if given.against is None else given.against.resolve()
    binary = peer.llama_server() if given.against is None else None
    code = LOAD.format(model=given.model, n_ctx=n_ctx, n_slots=n_slots)
    seconds: dict[str, list[float]] = {"llmkit serve": [], "load()": [], rival: []}
    with tempfile.TemporaryDirectory() as data:
        own = {**arms.using(arms.ROOT), "XDG_DATA_HOME": data}
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        theirs = {**own, "PYTHONPATH": str(tree)} if binary is None else {**os.environ}
        if binary is not None:
            theirs["LD_LIBRARY_PATH"] = str(binary.parent)
        for _ in range(1 + given.reps):
            port, other = arms.free_port(), arms.free_port()
            command = [sys.executable, "-m", "llmkit", "serve", given.model, "--port", str(port)]
            options = ["--n-ctx", str(n_ctx), "--n-slots", str(n_slots)]
            seconds["llmkit serve"].append(served([*command, *options], port, own))
            seconds["load()"].append(loaded(code, own))
            if binary is not None:
                command = [str(binary), "--host", "127.0.0.1", "--port", str(port), "-m", str(path)]
                options = ["-c", str(n_ctx * n_slots), "-np", str(n_slots), "-fa", "on", "--no-ui"]
            command[command.index("--port") + 1] = str(other)
            seconds[rival].append(served([*command, *options], other, theirs, tree))
    for name, own_s in seconds.items():
        pairs = zip(own_s, seconds[rival], strict=True)
        ratio = statistics.median(a / b for a, b in list(pairs)[1:])
        print(f"{name:14} {statistics.median(own_s[1:]):5.2f} s, {ratio:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
