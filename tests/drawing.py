"""For the tests of drawing: a model that draws without a library, a file that the real library
takes, and a reader of images."""

from __future__ import annotations

import io
import json
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmkit.diffusion.files import encoded
from llmkit.errors import EngineError
from llmkit.protocol.images import Drawing, Picture, Step

__all__ = ["FakePainter", "image", "write_decoder", "write_model"]


class FakePainter:
    """An `ImageGenerator` whose images have the colour of their seed. ``gate``, if set, is waited
    for before each step after the first."""

    size, steps = (128, 64), 4

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"architecture": "fake", "weights_bytes": 1000}
        self.gate: threading.Semaphore | None = None
        self.stopped = threading.Event()
        self.asked: list[tuple[str, Drawing]] = []

    def images(
        self, prompt: str, options: Drawing, is_over: Callable[[], bool] = lambda: False
    ) -> Iterator[Step | Picture]:
        self.asked.append((prompt, options))
        width, height = options.width or 0, options.height or 0
        assert options.seed is not None and options.steps is not None
        for index in range(options.n):
            if prompt == "crash":
                raise EngineError("the process that draws ended by SIGKILL")
            shown = [
                round(options.steps * (i + 1) / (options.previews + 1))
                for i in range(options.previews)
            ]
            for step in range(options.steps + 1):
                while self.gate is not None and step and not self.gate.acquire(timeout=0.05):
                    if is_over():
                        self.stopped.set()
                        return
                small = bytes([step, 0, 0]) * (width * height // 64)
                seen = encoded(small, width // 8, height // 8, options)
                yield Step(index, step, options.steps, seen if step in shown else b"")
            seed = options.seed + index
            pixels = bytes([seed % 256, 7, 9]) * (width * height)
            data = encoded(pixels, width, height, options, {"seed": str(seed)})
            yield Picture(index, seed, width, height, data)

    def close(self) -> None:
        self.stopped.set()


def image(data: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(data))
    found.load()
    return found


def write_model(path: Path) -> None:
    """The tensors of a small Stable Diffusion, all zeros: 893 MB that take 84 KB on the disk."""
    at, header = 0, {}
    for name, shape in _tensors().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    with path.open("wb") as file:
        file.write(_head(header))
        file.truncate(file.tell() + at)


def write_decoder(path: Path) -> None:
    """A small decoder with random weights, 10 MB."""
    arrays = _decoder(np.random.default_rng(1))
    at, header = 0, {}
    for name, array in arrays.items():
        span = [at, at + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    path.write_bytes(_head(header) + b"".join(array.tobytes() for array in arrays.values()))


def _head(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _Shapes(dict[str, tuple[int, ...]]):
    def linear(self, name: str, made: int, read: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = (made, read)
        if bias:
            self[f"{name}.bias"] = (made,)

    def convolution(self, name: str, made: int, read: int, side: int = 3) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (made, read, side, side), (made,)

    def norm(self, name: str, channels: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (channels,)

    def residual(self, name: str, read: int, made: int) -> None:
        self.norm(f"{name}.in_layers.0", read)
        self.convolution(f"{name}.in_layers.2", made, read)
        self.linear(f"{name}.emb_layers.1", made, 1280)
        self.norm(f"{name}.out_layers.0", made)
        self.convolution(f"{name}.out_layers.3", made, made)
        if read != made:
            self.convolution(f"{name}.skip_connection", made, read, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        self.convolution(f"{name}.proj_in", channels, channels, 1)
        block = f"{name}.transformer_blocks.0"
        for part, context in (("attn1", channels), ("attn2", 768)):
            self.linear(f"{block}.{part}.to_q", channels, channels, bias=False)
            self.linear(f"{block}.{part}.to_k", channels, context, bias=False)
            self.linear(f"{block}.{part}.to_v", channels, context, bias=False)
            self.linear(f"{block}.{part}.to_out.0", channels, channels)
        self.linear(f"{block}.ff.net.0.proj", 8 * channels, channels)
        self.linear(f"{block}.ff.net.2", channels, 4 * channels)
        for number in (1, 2, 3):
            self.norm(f"{block}.norm{number}", channels)
        self.convolution(f"{name}.proj_out", channels, channels, 1)


def _tensors() -> _Shapes:
    shapes, model = _Shapes(), "model.diffusion_model."
    shapes.linear(f"{model}time_embed.0", 1280, 320)
    shapes.linear(f"{model}time_embed.2", 1280, 1280)
    shapes.convolution(f"{model}input_blocks.0.0", 320, 4)
    widths, width = [320], 320
    for block, made in ((1, 320), (4, 640), (7, 1280)):
        shapes.residual(f"{model}input_blocks.{block}.0", width, made)
        shapes.attention(f"{model}input_blocks.{block}.1", made)
        widths.append(width := made)
        if made < 1280:
            shapes.convolution(f"{model}input_blocks.{block + 2}.0.op", width, width)
            widths.append(width)
    for block, made in ((0, 1280), (1, 1280), (3, 640), (4, 640), (6, 320), (7, 320)):
        shapes.residual(f"{model}output_blocks.{block}.0", width + widths.pop(), made)
        shapes.attention(f"{model}output_blocks.{block}.1", made)
        width = made
    shapes.convolution(f"{model}output_blocks.2.1.conv", 1280, 1280)
    shapes.convolution(f"{model}output_blocks.5.2.conv", 640, 640)
    shapes.norm(f"{model}out.0", width)
    shapes.convolution(f"{model}out.2", 4, 320)
    text = "cond_stage_model.transformer.text_model."
    shapes[f"{text}embeddings.token_embedding.weight"] = (49408, 768)
    shapes[f"{text}embeddings.position_embedding.weight"] = (77, 768)
    for layer in range(12):
        name = f"{text}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.linear(f"{name}self_attn.{part}", 768, 768)
        shapes.norm(f"{name}layer_norm1", 768)
        shapes.norm(f"{name}layer_norm2", 768)
        shapes.linear(f"{name}mlp.fc1", 3072, 768)
        shapes.linear(f"{name}mlp.fc2", 768, 3072)
    shapes.norm(f"{text}final_layer_norm", 768)
    return shapes


def _decoder(random: np.random.Generator) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def convolution(name: str, made: int, read: int, *, bias: bool = True) -> None:
        drawn = random.standard_normal((made, read, 3, 3)) * (0.7 / np.sqrt(9 * read))
        arrays[f"{name}.weight"] = drawn.astype(np.float32)
        if bias:
            arrays[f"{name}.bias"] = np.zeros(made, np.float32)

    def block(name: str) -> None:
        for part in (0, 2, 4):
            convolution(f"{name}.conv.{part}", 64, 64)

    convolution("decoder.layers.0", 64, 4)
    layer = 2
    for _ in range(3):
        for _ in range(3):
            block(f"decoder.layers.{layer}")
            layer += 1
        convolution(f"decoder.layers.{layer + 1}", 64, 64, bias=False)
        layer += 2
    block(f"decoder.layers.{layer}")
    convolution(f"decoder.layers.{layer + 1}", 3, 64)
    convolution("encoder.layers.0", 64, 3)
    block("encoder.layers.1")
    layer = 2
    for _ in range(3):
        convolution(f"encoder.layers.{layer}", 64, 64, bias=False)
        layer += 1
        for _ in range(3):
            block(f"encoder.layers.{layer}")
            layer += 1
    convolution(f"encoder.layers.{layer}", 4, 64)
    return arrays
