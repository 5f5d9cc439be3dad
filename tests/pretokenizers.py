"""Every pre-tokenizer of llama.cpp against texts that its patterns take whole.

As a program: ``pretokenizers.py LENGTH [NAME ...]``, each name in a process of its own, since what
is looked for is its end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

# One name for each kind that llama.cpp 0.3.36's sources know.
NAMES = [
    "default",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "falcon",
    "mpt",
    "starcoder",
    "gpt-2",
    "stablelm2",
    "command-r",
    "qwen2",
    "qwen35",
    "olmo",
    "dbrx",
    "smaug-bpe",
    "poro-chat",
    "chatglm-bpe",
    "viking",
    "jais",
    "jais-2",
    "tekken",
    "smollm",
    "codeshell",
    "bloom",
    "gpt3-finnish",
    "exaone",
    "exaone-moe",
    "chameleon",
    "minerva-7b",
    "gpt-4o",
    "superbpe",
    "trillion",
    "bailingmoe",
    "llama4",
    "pixtral",
    "seed-coder",
    "llama-bpe",
    "a.x-4.0",
    "hunyuan",
    "hunyuan-dense",
    "kimi-k2",
    "grok-2",
    "granite-docling",
    "minimax-m2",
    "afmoe",
    "gemma4",
    "glm4",
    "lfm2",
    "modern-bert",
    "youtu",
    "solar-open",
    "tiny_aya",
    "minicpm5",
    "spark2_5",
    "ufakzeka",
    "laguna",
    "granite-embed-multi-97m",
    "talkie",
    "roberta-bpe",
    "whitespace",
]
PATTERNS = {
    "letters": "a", "capitals": "A", "both": "aB", "digits": "1", "spaces": " ",
    "ends": "\n", "returns": "\r\n", "space and end": " \n", "tabs": "\t", "marks": "!",
    "marks and low lines": "!_", "low lines": "_", "dots": ".", "brackets": "(",
    "quotes": "'", "apostrophes": "'s", "Thai": "กา", "Thai letters": "ก",
    "Devanagari": "कि", "Chinese": "中", "Chinese and marks": "中。", "kana": "かカ",
    "Hangul": "한", "Cyrillic": "ж", "Greek": "α", "accents": "é", "combined": "e\u0301",
    "only combining": "\u0301", "emoji": "😀", "joined emoji": "👨\u200d👩",
    "letter and digit": "a1", "digit and space": "1 ", "word and space": "ab ",
    "space and word": " a", "letter and mark": "a!", "full width": "！",
    "zero width": "\u200b", "separators": "\u2028",
    "spaces of all kinds": " \t\u00a0\u2003", "slashes": "/", "equals": "=",
    "currency": "$1", "nul": "\0", "private": "\ue000", "mixed": "aA1 _!中é\u0301",
}  # fmt: skip


def write_vocabulary(path: Path, pre: str) -> Path:
    """SmolLM2's vocabulary, without weights, for another pre-tokenizer."""
    import gguf

    from llmkit.models.registry import resolve

    reader = gguf.GGUFReader(resolve("smollm2").path)

    def value(key: str) -> object:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", int(value(f"llama.{key}")))  # type: ignore[call-overload]
    writer.add_head_count(int(value("llama.attention.head_count")))  # type: ignore[call-overload]
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(value("tokenizer.ggml.tokens"))
    writer.add_token_types(value("tokenizer.ggml.token_type"))
    writer.add_token_merges(value("tokenizer.ggml.merges"))
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def child(path: Path, length: int) -> None:
    from llmkit.backend import library
    from llmkit.backend.library import C
    from llmkit.backend.vocab import Vocab
    from llmkit.errors import InvalidRequestError

    library.start()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        print("refused", flush=True)
        return
    print("loaded", flush=True)
    vocab = Vocab(model)
    for name, pattern in PATTERNS.items():
        print(name, flush=True)
        began = time.process_time()
        try:
            vocab.tokenize((pattern * (length // len(pattern) + 1))[:length])
        except InvalidRequestError as error:
            print(f"  {error}", flush=True)
        seconds = time.process_time() - began
        if seconds > 10:
            print(f"  slow: {seconds:.1f} s", flush=True)
    print("whole", flush=True)


def scan(length: int, names: tuple[str, ...] | list[str] = tuple(NAMES)) -> dict[str, str]:
    """What went wrong, by name: nothing, hopefully."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = write_vocabulary(Path(folder) / "vocabulary.gguf", name)
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(path), str(length)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            lines = done.stdout.splitlines()
            slow = [
                f"{lines[i - 1]}{line}" for i, line in enumerate(lines) if line.startswith("  slow")
            ]
            if (
                not lines
            ):  # llama.cpp's own end at the load of such a file, which the probe sees in a child
                lines = ["refused"]
            elif lines[-1] not in ("whole", "refused"):
                found[name] = f"ended with {done.returncode} at {lines[-1]!r}"
            elif slow:
                found[name] = "; ".join(slow)
            path.unlink()
            if __name__ == "__main__":
                print(name, found.get(name, lines[-1]), flush=True)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(bool(scan(int(sys.argv[1]), sys.argv[2:] or NAMES)))
