"""How the layers of a model are spread over GPUs, as llama.cpp does it. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["DeviceNeed", "Gpu", "places"]

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU with its free memory in bytes."""

    name: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """What a model would take of one GPU, in bytes."""

    name: str
    num_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.free_bytes

    def __str__(self) -> str:
        return f"{self.num_bytes / GIB:.2f} of {self.free_bytes / GIB:.2f} GiB free on {self.name}"


def places(num_layers: int, gpus: Sequence[Gpu], shares: Sequence[float] = ()) -> list[int]:
    """The GPU of each of ``num_layers`` layers, the output layer being the last.

    By ``shares``, or else by free memory.

    >>> places(4, [Gpu("CUDA0", 3), Gpu("CUDA1", 1)])
    [0, 0, 0, 1]
    """
    if not gpus:
        return []
    given = [*shares, *[0.0] * len(gpus)][: len(gpus)]
    weights = given if sum(given) > 0 else [max(gpu.free_bytes, 1) for gpu in gpus]
    ends = [end / sum(weights) for end in accumulate(weights)]
    last = max(i for i, weight in enumerate(weights) if weight > 0)
    return [min(bisect_right(ends, i / num_layers), last) for i in range(num_layers)]
