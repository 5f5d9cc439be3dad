"""Opens a model file that is new to this machine in a child process first, to protect the kernel.

llama.cpp ends its process when a file is inconsistent (an assert, an uncaught exception), in more
ways than we could check for. The child loads the file as we would, with its adapters, renders the
chat template, tokenizes a text and computes one token, within limits on memory and time. Files that
pass are remembered by content and not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from llmkit.bridge.child import Child, Line, Owner
from llmkit.errors import LLMKitError, ModelLoadError
from llmkit.models import gguf
from llmkit.models.projectors import read_projector
from llmkit.models.registry import cache_folder
from llmkit.system.endings import ended, reason_in, signal_name
from llmkit.version import __version__

if TYPE_CHECKING:
    from llmkit.backend.model import LlamaModel

__all__ = ["child", "probe"]

TARGET = "llmkit.runtime.probing:child"
END_S = 10.0
TEXT = (
    "The quick brown fox jumps over the lazy dog. Größe, 数字 12345, emoji 😀\n\n"
    "  def f(x): return x ** 2\n"
)
SAMPLE_BYTES = 1 << 20
HEADER_BYTES = 16 << 20
BASE_S, BYTES_PER_S = 60.0, 20e6  # for slow disks and busy machines
BASE_CPU_S, BYTES_PER_CPU_S = 30, 50e6
BASE_MEMORY = 6 << 30
MAX_REMEMBERED = 10_000


def probe(
    path: Path,
    lora: Sequence[Path] = (),
    projector: Path | None = None,
    *,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Open a model file, with adapters and a projector, in a child process, unless it is known.

    ``on_wait`` is called ten times a second. Raises what the child raised, or a `ModelLoadError`
    that says how the child ended.
    """
    info = gguf.read_header(path)
    files = [*info.files, *lora, *([projector] if projector is not None else [])]
    for file in lora:
        _check_adapter(file)
    if projector is not None:
        read_projector(projector)
    mark = _mark(
        files, max(HEADER_BYTES, info.file_bytes - sum(t.num_bytes or 0 for t in info.tensors))
    )
    known = cache_folder().parent / "probed" / mark
    with contextlib.suppress(OSError):  # unreadable folder: unknown
        if known.exists():
            return
    _run(path, lora, projector, sum(f.stat().st_size for f in files), on_wait)
    with contextlib.suppress(OSError):  # unwritable folder: tried again next time
        known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known.write_text(f"{path.name}\n")
        _forget_the_oldest(known.parent)


def _check_adapter(path: Path) -> None:
    """Check an adapter without llama.cpp. Raises `ModelLoadError`."""
    if not path.is_file():
        raise ModelLoadError(f"there is no adapter {path}.")
    info = gguf.read_header(path)
    kind = info.metadata.get("general.type", "adapter")
    if kind != "adapter" or info.metadata.get("adapter.type", "lora") != "lora":
        raise ModelLoadError(f"{path} is not a LoRA adapter but {kind!r:.40}.")


def _mark(files: Sequence[Path], header_bytes: int) -> str:
    """A digest of files (size, header, samples of the rest) and of the versions reading them."""
    from llmkit.backend import library

    digest = hashlib.sha256(f"{__version__} {library.build()}".encode())
    for file in files:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(f" {size} ".encode())
            digest.update(opened.read(header_bytes))
            for place in range(1, 17):
                opened.seek(max(0, (size - SAMPLE_BYTES // 16) * place // 16))
                digest.update(opened.read(SAMPLE_BYTES // 16))
    return digest.hexdigest()


def _forget_the_oldest(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) > MAX_REMEMBERED:
        for entry in sorted(entries, key=lambda e: e.stat().st_mtime)[: MAX_REMEMBERED // 10]:
            entry.unlink(missing_ok=True)


def _run(
    path: Path,
    lora: Sequence[Path],
    projector: Path | None,
    size: int,
    on_wait: Callable[[], None],
) -> None:
    task = {
        "path": str(path),
        "lora": [str(p) for p in lora],
        "projector": None if projector is None else str(projector),
        "memory": BASE_MEMORY + 3 * size,
        "cpu_s": int(BASE_CPU_S + size / BYTES_PER_CPU_S),
    }
    with tempfile.TemporaryFile() as words:
        child = Child(
            TARGET,
            task,
            environment={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
            errors=words,
        )
        said = Line()
        try:
            end = time.monotonic() + BASE_S + size / BYTES_PER_S
            while True:
                if time.monotonic() > end:
                    raise ModelLoadError(
                        f"{path.name} failed its check in a separate process: it timed out."
                    )
                with contextlib.suppress(msgspec.DecodeError):  # not an answer
                    said = child.read(0.1) or said
                on_wait()
        except EOFError:
            child.close_input()
            child.wait(END_S)
        finally:
            child.close_input()
            child.kill()
        words.seek(0)
        _judge(path, projector, child.status or 0, said, words.read(1 << 20))


def _judge(path: Path, projector: Path | None, status: int, said: Line, words: bytes) -> None:
    if said.failure is not None:
        raise said.failure.error()
    if said.ready is not None:
        return
    name = path.name if projector is None else f"{path.name} with {projector.name}"
    if status == -getattr(signal, "SIGXCPU", 0):
        how = "it took more time than its size explains"
    elif status == -getattr(signal, "SIGKILL", 0):
        raise ModelLoadError(
            f"the process that checked {name} was killed; perhaps the machine ran out of "
            "memory. Try again."
        )
    elif status < 0:
        how = f"it crashed the process ({signal_name(-status)})"
    else:
        how = f"the process {ended(status)}"
    reason = reason_in(words.decode("utf-8", "replace").splitlines())
    raise ModelLoadError(f"{name} failed its check in a separate process: {how}. {reason}".rstrip())


def child(owner: Owner) -> None:
    """Entry point of the child process."""
    task = owner.task
    _limit(task["memory"], task["cpu_s"])
    try:
        projector = task["projector"] and Path(task["projector"])
        _open(Path(task["path"]), [Path(p) for p in task["lora"]], projector)
    except LLMKitError:
        raise
    except MemoryError:
        raise ModelLoadError("the file needs more memory than its size explains.") from None
    except Exception as error:
        raise ModelLoadError(f"the file cannot be used: {error!r:.300}") from error
    owner.ready()
    os._exit(0)  # freeing memory would only take time


def _limit(memory: int, cpu_s: int) -> None:
    if sys.platform == "win32":
        return
    import resource

    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory),
    ):
        with contextlib.suppress(ValueError, OSError):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(
                kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
            )


def _open(path: Path, lora: list[Path], projector: Path | None) -> None:
    """Do all that a load and a first request do."""
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
        raise ModelLoadError(
            f"{path.name} is not a text generation model: "
            "it has no plain decoder, or no vocabulary."
        )
    from llmkit.backend.llama import LlamaRunner
    from llmkit.chat.template import ChatTemplate
    from llmkit.engine.batch import Batch, Chunk, Open
    from llmkit.protocol import Message, SamplingParams

    if projector is not None:
        _encode(model, projector)
    template = ChatTemplate(
        str(info.metadata.get("tokenizer.chat_template") or ""),
        bos=vocab.token_text(vocab.bos),
        eos=vocab.token_text(vocab.eos),
    )
    with contextlib.suppress(LLMKitError):  # a template may refuse this; chats will report it
        template.render([Message("user", TEXT)])
    runner = LlamaRunner(model, n_ctx=256, n_slots=1, max_batch_tokens=64, threads=2, lora=lora)
    adapters = tuple((file.stem, 1.0) for file in lora)
    output = runner.execute(
        Batch(
            (Chunk(0, 0, tokens or [0], True),),
            (Open(0, 1, SamplingParams(temperature=0), tokens or [0], adapters=adapters),),
        )
    )
    if output.error or output.faults:
        raise ModelLoadError(
            f"{path.name} cannot be computed: {output.error or output.faults[0][1]}"
        )


def _encode(model: LlamaModel, path: Path) -> None:
    """Encode an image and a sound, of what the projector takes."""
    import numpy as np

    from llmkit.backend.media import Projector

    projector = Projector(path, model, threads=2)
    samples: dict[str, np.ndarray] = {
        "image": np.full((48, 64, 3), 128, np.uint8),
        "audio": np.zeros(max(projector.sample_rate, 1), np.float32),
    }
    for kind in projector.inputs:
        _, prepared = projector.prepare(kind, samples[kind])
        for chunk in prepared.chunks:
            rows = projector.encode(chunk).rows
            if not np.isfinite(rows).all():
                raise ModelLoadError(f"{path.name} produces invalid numbers for {kind} input.")
