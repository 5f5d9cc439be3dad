"""On which GPUs llama.cpp puts a model: the option's words in its parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import InvalidRequestError

__all__ = ["Placement", "chosen"]

SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """How a model is spread: ``tensor_split`` gives each GPU's share; empty: by free memory."""

    split_mode: str = "layer"
    main_device: int = 0
    tensor_split: tuple[float, ...] = ()

    def apply(self, params: Any, most: int) -> None:
        """Write llama.cpp's model parameters, which keep the shares alive.

        ``most`` is the number of devices that llama.cpp could ever have.
        """
        params.split_mode = SPLIT_MODES[self.split_mode]
        params.main_gpu = self.main_device
        if self.tensor_split:
            shares = (ctypes.c_float * max(most, len(self.tensor_split)))(*self.tensor_split)
            params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))


def chosen(placement: Placement, names: Sequence[str]) -> list[int]:
    """The indices of the GPUs that this placement uses, of those that llama.cpp sees.

    Raises `InvalidRequestError` if it names one that is not there.
    """
    there = f"llama.cpp sees {', '.join(names) or 'no GPU'} here"
    # Without a GPU the first one may be named: a setting for machines with and without.
    if placement.main_device >= max(len(names), 1):
        raise InvalidRequestError(
            f"main_device {placement.main_device} does not exist: {there} (the first is 0; "
            "`llmkit doctor` lists them).",
            "main_device",
        )
    if len(placement.tensor_split) > max(len(names), 1):
        raise InvalidRequestError(
            f"tensor_split has {len(placement.tensor_split)} shares, but {there}; "
            "give at most one for each GPU.",
            "tensor_split",
        )
    if placement.split_mode == "none":
        return [placement.main_device] if names else []
    return list(range(len(names)))
