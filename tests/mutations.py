"""Model files that lie: a tiny model's header changed on purpose and at random. As a program:
``mutations.py COUNT`` loads so many in one process, which must outlive them all."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

KEYS = (
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "general.architecture",
    "general.alignment",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template",
)
NUMBERS = (0, 1, 2, 3, 7, 255, 511, 512, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (
    b"none",
    b"no_vocab",
    b"gpt2",
    b"bert",
    b"rwkv",
    b"t5",
    b"plamo2",
    b"mamba",
    b"gemma2",
    b"qwen3moe",
    b"deepseek2",
    b"",
    b"\xff\xfe",
    b"llama" * 50,
)
TEMPLATES = (
    "{{ 'a'.ljust(10**11) }}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% if " * 25,
    "{{ '%99999999d' % 1 }}",
    "<think>" + "{{ x" * 50,
    (
        "{% set ns = namespace(t=()) %}{% for i in range(99999) %}{% set ns.t = (ns.t,) %}"
        "{% endfor %}{{ {ns.t: 1} }}"
    ),
)


def mutants(good: bytes, count: int, seed: int = 7) -> Iterator[tuple[str, bytes]]:
    """Names and contents."""
    rng = random.Random(seed)
    structured = list(_structured(good))
    rng.shuffle(structured)
    yield from structured[: count // 2]
    header = good.find(b"token_embd.weight") + 4000
    for i in range(count - min(count // 2, len(structured))):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(4, header)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        if i % 10 == 0:
            del data[rng.randrange(16, len(data)) :]
        yield f"random {i}", bytes(data)


def _structured(good: bytes) -> Iterator[tuple[str, bytes]]:
    for key in KEYS:
        at = good.find(key.encode())
        if at < 0:
            continue
        value = at + len(key) + 4
        kind = int.from_bytes(good[at + len(key) : value], "little")
        if kind == 8:  # a text: its length, and its bytes
            size = int.from_bytes(good[value : value + 8], "little")
            for word in (*WORDS, *(t.encode() for t in TEMPLATES if "template" in key)):
                yield (
                    f"{key}={word[:30]!r}",
                    _padded(good, value, value + 8 + size, len(word).to_bytes(8, "little") + word),
                )
            yield (
                f"{key} of 2^40 bytes",
                good[:value] + (1 << 40).to_bytes(8, "little") + good[value + 8 :],
            )
        else:
            for number in NUMBERS:
                yield (
                    f"{key}={number}",
                    good[:value] + number.to_bytes(4, "little") + good[value + 4 :],
                )
        for other in range(13):
            yield (
                f"{key} of type {other}",
                good[: at + len(key)] + other.to_bytes(4, "little") + good[value:],
            )
    for name in (
        b"token_embd.weight",
        b"output_norm.weight",
        b"blk.0.attn_q.weight",
        b"blk.1.ffn_up.weight",
        b"output.weight",
    ):
        at = good.find(name) + len(name)
        dims = int.from_bytes(good[at : at + 4], "little")
        place = at + 4 + 8 * dims
        for kind in (*range(32), 39, 255):
            yield (
                f"{name.decode()} in type {kind}",
                good[:place] + kind.to_bytes(4, "little") + good[place + 4 :],
            )
        for size in (0, 1, 3, 1 << 20, 1 << 62):
            yield (
                f"{name.decode()} of {size} rows",
                good[: at + 4] + size.to_bytes(8, "little") + good[at + 12 :],
            )
        yield f"without {name.decode()}", good.replace(name, b"x" * len(name))
    twice = good.find(b"<unk>")
    yield "a token twice", good[:twice] + b"</s>>" + good[twice + 5 :]


def _padded(good: bytes, start: int, end: int, new: bytes) -> bytes:
    """The file with another text in its header, and the tensors where they must be."""
    import gguf

    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    data = len(good) - _data_size(good)
    header = good[:start] + new + good[end : data - _padding(good, data)]
    return header + b"\0" * (-len(header) % alignment) + good[data:]


def _data_size(good: bytes) -> int:

    from llmkit.models import gguf as header

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(good)
        file.flush()
        info = header.read_header(file.name)

    return max(t.offset + -(-(t.num_bytes or 0) // 32) * 32 for t in info.tensors)


def _padding(good: bytes, data: int) -> int:
    count = 0
    while count < 31 and good[data - 1 - count] == 0:
        count += 1
    return 0 if count == 0 else min(count, 31)


VICTIM = """
import sys, warnings
from pathlib import Path
import llmkit
for line in sys.stdin:
    path = Path(line.rstrip("\\n"))
    try:
        llm = llmkit.load(path, n_ctx=64, n_slots=1, share=False)
    except llmkit.LLMKitError as error:
        print("refused", type(error).__name__, str(error)[:150].replace("\\n", " "), flush=True)
        continue
    try:
        llm.generate("Grüße, 数字 12 😀", max_tokens=2)
        llm.chat("Hello", max_tokens=2)
        print("works", flush=True)
    except llmkit.LLMKitError as error:
        print("works, but", type(error).__name__, str(error)[:150].replace("\\n", " "), flush=True)
    finally:
        llm.unload()
"""


def run(count: int, cache: Path, seed: int = 7) -> dict[str, list[str]]:
    """What a process that loads them all says of each; under "died" or "unclean" what ended it, or
    got out raw."""
    import os

    import tiny_models

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        good = tiny_models.write(
            Path(folder) / "good.gguf",
            "llama",
            template="{% for m in messages %}{{ m.content }}{% endfor %}",
        ).read_bytes()
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "2"}
        victim: subprocess.Popen[str] | None = None
        path = Path(folder) / "mutant.gguf"
        for name, data in mutants(good, count, seed):
            path.write_bytes(data)
            if victim is None:
                victim = subprocess.Popen(
                    [sys.executable, "-c", VICTIM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            assert (
                victim.stdin is not None and victim.stdout is not None and victim.stderr is not None
            )
            victim.stdin.write(f"{path}\n")
            victim.stdin.flush()
            answer = victim.stdout.readline().strip()
            if not answer:
                status, words = victim.wait(), victim.stderr.read()
                kind = "unclean" if "Traceback" in words and status == 1 else "died"
                found.setdefault(kind, []).append(
                    f"{name}: {status} {words.strip().splitlines()[-1:]}"
                )
                victim = None
            else:
                found.setdefault(answer.split()[0], []).append(f"{name}: {answer}")
        if victim is not None and victim.stdin is not None:
            victim.stdin.close()
            victim.wait(30)
            for pipe in (victim.stdout, victim.stderr):
                if pipe is not None:
                    pipe.close()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        result = run(int(sys.argv[1]), Path(place))
    for kind, entries in result.items():
        print(kind, len(entries))
    print(
        "\n".join(
            [
                *result.get("died", []),
                *result.get("unclean", []),
                *result.get("refused", [])[:10],
                *result.get("works", [])[:5],
            ]
        )
    )
    sys.exit(bool(result.get("died") or result.get("unclean")))
