"""A model file that was never seen on this machine is opened in a child process first: what ends that process does not end the kernel.

llama.cpp ends the process it runs in when a file lies to it (an assert, an exception that nobody catches), and knows more ways to be lied to than a list can
name. The child loads the file as we would, with its adapters, renders its chat template, tokenizes a text and computes one token, with limits on memory and
time. A file that survives is remembered by its content, and is not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import LLMKitError, ModelLoadError
from llmkit.machine import python_path
from llmkit.models import gguf
from llmkit.models.registry import cache_folder
from llmkit.version import __version__

__all__ = ["child", "probe"]

CHILD = "import os; answers = os.dup(1); os.dup2(2, 1); from llmkit.probing import child; child(answers)"
TEXT = "The quick brown fox jumps over the lazy dog. Größe, 数字 12345, emoji 😀\n\n  def f(x): return x ** 2\n"
SAMPLE_BYTES = 1 << 20
HEADER_BYTES = 16 << 20
BASE_S, BYTES_PER_S = 60.0, 20e6  # a slow disk, and a machine that others use
BASE_CPU_S, BYTES_PER_CPU_S = 30, 50e6
BASE_MEMORY = 6 << 30
MAX_REMEMBERED = 10_000


def probe(path: Path, lora: Sequence[Path] = (), *, on_wait: Callable[[], None] = lambda: None) -> None:
    """Open a model file, with adapters, in a child process, unless it is known. ``on_wait`` is called ten times a second.

    Raises `ModelLoadError` that says what became of the child, or what the child raised.
    """
    info = gguf.read_header(path)
    files = [*info.files, *lora]
    for file in lora:
        _check_adapter(file)
    mark = _mark(files, max(HEADER_BYTES, info.file_bytes - sum(t.num_bytes or 0 for t in info.tensors)))
    known = cache_folder().parent / "probed" / mark
    with contextlib.suppress(OSError):  # a folder that cannot be searched knows nothing
        if known.exists():
            return
    _run(path, lora, sum(f.stat().st_size for f in files), on_wait)
    with contextlib.suppress(OSError):  # a folder that cannot be written: it is tried again next time
        known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known.write_text(f"{path.name}\n")
        _forget_the_oldest(known.parent)


def _check_adapter(path: Path) -> None:
    """What can be said of an adapter without llama.cpp. Raises `ModelLoadError`."""
    if not path.is_file():
        raise ModelLoadError(f"there is no adapter {path}.")
    info = gguf.read_header(path)
    kind = info.metadata.get("general.type", "adapter")
    if kind != "adapter" or info.metadata.get("adapter.type", "lora") != "lora":
        raise ModelLoadError(f"{path} is no LoRA adapter: it says that it is {kind!r:.40}.")


def _mark(files: Sequence[Path], header_bytes: int) -> str:
    """Stands for the content of files: size, header, and samples of the rest; and for what reads them."""
    digest = hashlib.sha256(f"{__version__} {_llama_cpp()}".encode())
    for file in files:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(f" {size} ".encode())
            digest.update(opened.read(header_bytes))
            for place in range(1, 17):
                opened.seek(max(0, (size - SAMPLE_BYTES // 16) * place // 16))
                digest.update(opened.read(SAMPLE_BYTES // 16))
    return digest.hexdigest()


def _llama_cpp() -> str:
    from importlib.metadata import version

    return version("llama-cpp-python")


def _forget_the_oldest(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) > MAX_REMEMBERED:
        for entry in sorted(entries, key=lambda e: e.stat().st_mtime)[: MAX_REMEMBERED // 10]:
            entry.unlink(missing_ok=True)


def _run(path: Path, lora: Sequence[Path], size: int, on_wait: Callable[[], None]) -> None:
    limits = {"memory": BASE_MEMORY + 3 * size, "cpu_s": int(BASE_CPU_S + size / BYTES_PER_CPU_S)}
    asked = json.dumps({"path": str(path), "lora": [str(p) for p in lora], **limits}) + "\n"
    environment = {**os.environ, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD], env=environment, stdin=subprocess.PIPE, stdout=answer, stderr=words, start_new_session=True
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(asked.encode())
                process.stdin.flush()  # and it stays open: the child ends when we do
            end = time.monotonic() + BASE_S + size / BYTES_PER_S
            while process.poll() is None:
                if time.monotonic() > end:
                    raise ModelLoadError(f"{path.name} failed its check in a separate process: it did not end in time.")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                on_wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        answer.seek(0)
        words.seek(0)
        _judge(path, process.returncode, answer.read(1 << 20), words.read(1 << 20))


def _judge(path: Path, status: int, answer: bytes, words: bytes) -> None:
    from llmkit.bridge.messages import error_from

    try:
        said: dict[str, Any] = json.loads(answer)
    except ValueError:
        said = {}
    if said.get("error"):
        raise error_from(said["error"])
    if status == 0 and said.get("fine"):
        return
    lines = [line for line in words.decode("utf-8", "replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "ASSERT" in line or "terminate" in line or "rror" in line), lines[-1] if lines else "")
    if status == -getattr(signal, "SIGXCPU", 0):
        how = "it took more time than a file of its size can need"
    elif status == -getattr(signal, "SIGKILL", 0):
        raise ModelLoadError(f"the process that tried {path.name} was killed; perhaps the machine ran out of memory. Try again.")
    elif status < 0:
        how = f"it ended the process ({signal.Signals(-status).name})"
    else:
        how = f"the process ended with status {status}"
    raise ModelLoadError(f"{path.name} failed its check in a separate process: {how}. {last.strip():.300}".rstrip())


# -- in the child


def child(answers_fd: int) -> None:
    """What the child process runs."""
    asked = json.loads(sys.stdin.readline())
    _limit(asked["memory"], asked["cpu_s"])
    _end_with_the_parent()
    try:
        _open(Path(asked["path"]), [Path(p) for p in asked["lora"]])
        answer: dict[str, Any] = {"fine": True}
    except LLMKitError as error:
        from llmkit.bridge.messages import error_to

        answer = {"error": error_to(error)}
    except MemoryError:
        answer = {"error": {"type": "ModelLoadError", "message": "the file needs more memory than one of its size can."}}
    except Exception as error:
        answer = {"error": {"type": "ModelLoadError", "message": f"the file cannot be used: {error!r:.300}"}}
    with os.fdopen(answers_fd, "w") as answers:
        json.dump(answer, answers)
    sys.stdout.flush()
    os._exit(0)  # what it holds is not worth freeing


def _limit(memory: int, cpu_s: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory)):
        with contextlib.suppress(ValueError, OSError):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _end_with_the_parent() -> None:
    import threading

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _open(path: Path, lora: list[Path]) -> None:
    """Everything that a load and a first request do."""
    from llmkit.backend.model import LlamaModel

    info = gguf.read_header(path)
    model = LlamaModel(path, n_gpu_layers=0)
    vocab = model.vocab
    tokens = [t for t in vocab.tokenize(TEXT) if 0 <= t < vocab.n_tokens][:48]
    vocab.pieces_with_specials()
    if info.value("pooling_type") in (1, 2, 3, 4):
        from llmkit.backend.embedder import Embedder

        Embedder(model, max_tokens=64, threads=2).encode([tokens or [0]])
        return
    if not model.can_generate:
        raise ModelLoadError(f"{path.name} is not a text generation model: it has no plain decoder, or no vocabulary.")
    from llmkit.backend.llama import LlamaRunner
    from llmkit.chat.template import ChatTemplate
    from llmkit.engine.batch import Batch, Chunk, Open
    from llmkit.types import Message, SamplingParams

    template = ChatTemplate(str(info.metadata.get("tokenizer.chat_template") or ""), bos=vocab.token_text(vocab.bos), eos=vocab.token_text(vocab.eos))
    with contextlib.suppress(LLMKitError):  # a template that refuses this is told to whoever chats
        template.render([Message("user", TEXT)])
    runner = LlamaRunner(model, n_ctx=256, n_slots=1, max_batch_tokens=64, threads=2, lora=lora)
    adapters = tuple((file.stem, 1.0) for file in lora)
    output = runner.execute(Batch((Chunk(0, 0, tokens or [0], True),), (Open(0, 1, SamplingParams(temperature=0), tokens or [0], adapters=adapters),)))
    if output.error or output.faults:
        raise ModelLoadError(f"{path.name} does not compute: {output.error or output.faults[0][1]}")
