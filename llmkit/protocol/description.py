"""What is known about a loaded model: identity, location, state and counters.

Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from llmkit.system.process import kernel_id

__all__ = ["READY", "EngineState", "EngineStats", "ModelDescription", "Origin", "Use"]

Use = Literal["generate", "embed", "hear", "speak", "draw"]


@dataclass(frozen=True, slots=True)
class EngineState:
    """Whether a model can be used.

    ``loading`` (``share`` is the fraction done, 0 to 1, if known), ``ready``, ``draining``
    (running requests finish, new ones are refused) or ``gone``, for a ``reason``; ``blameless``:
    no request can have ended it, since it said goodbye, its connection was lost in the middle of a
    silence, or was closed from this side.
    """

    phase: Literal["loading", "ready", "draining", "gone"] = "ready"
    reason: str | None = None
    share: float | None = None
    blameless: bool = False

    @property
    def is_gone(self) -> bool:
        return self.phase == "gone"

    @classmethod
    def gone_for(cls, reason: str | None, *, blameless: bool = False) -> EngineState:
        """Gone for this reason; ready without one."""
        return cls("gone", reason, blameless=blameless) if reason else READY


READY = EngineState()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model lives.

    In a Jupyter ``kernel`` or another ``process`` of this host (``pid``), on another ``host``, or
    behind a ``url``. ``shared``: other processes of this user can find it.
    """

    kind: Literal["kernel", "process", "host", "url"]
    pid: int | None = None
    kernel_id: str | None = None
    host: str = ""
    url: str = ""
    shared: bool = True

    @property
    def label(self) -> str:
        """What follows the ``@`` in an exact model name: kernel id, else process id, else place."""
        return self.kernel_id or (str(self.pid) if self.pid is not None else self.host or self.url)

    @classmethod
    def here(cls) -> Origin:
        """This process; not yet shared, so no other process can find it."""
        kernel = kernel_id()
        return cls("process" if kernel is None else "kernel", os.getpid(), kernel, shared=False)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine. Counters only grow; KV is in tokens (cells), times in seconds.

    ``busy_slots_total`` adds up, over all steps, the slots that were computed in each; ``drafts``
    are guesses of ``draft_tokens`` together. ``prompt_token_s`` and ``decode_step_s`` are what a
    prompt's token and a step of the present streams cost by the latest steps, 0 before the first;
    ``num_parked`` counts the prefixes kept in RAM beside those in slots. ``media_total`` counts
    images (tiles of them) and pieces of sound in prompts, ``encoded_total`` those that had to be
    encoded, ``encode_seconds_total`` the time for that; ``num_encoding`` requests wait for it now.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_cached_tokens: int = 0
    kv_capacity_tokens: int = 0
    num_slots: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    requests_total: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    preemptions_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    host_cached_tokens: int = 0
    backend_seconds_total: float = 0.0
    busy_slots_total: int = 0
    drafts_total: int = 0
    prompt_token_s: float = 0.0
    decode_step_s: float = 0.0
    num_parked: int = 0
    media_total: int = 0
    encoded_total: int = 0
    encode_seconds_total: float = 0.0
    num_encoding: int = 0
    encoded_bytes: int = 0

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV cells that running requests occupy, 0 to 1."""
        return self.kv_used_tokens / self.kv_capacity_tokens if self.kv_capacity_tokens else 0.0


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a client needs to know about a loaded model; sizes in bytes."""

    name: str
    path: str
    architecture: str = ""
    quantization: str = ""
    n_params: int = 0
    n_ctx: int = 0
    n_ctx_train: int = 0
    n_slots: int = 0
    n_vocab: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0  # approximate: vocabulary tables and one step's activations
    # Of these, the bytes on GPUs: "weights", "kv", "compute"; empty without a GPU.
    device_bytes: dict[str, int] = field(default_factory=dict, hash=False)
    # The same by GPU: "CUDA0" and so on.
    gpu_bytes: dict[str, int] = field(default_factory=dict, hash=False)
    embedding_size: int = 0
    ranks: bool = False  # scores pairs of texts
    tool_form: str = "general"  # how it writes tool calls, see llmkit.chat.tools
    reasoning: str = ""  # how it reasons before answering, see `ChatTemplate.reasoning`; or ""
    reasons_after_results: bool = True  # also after a tool result
    device: Literal["cpu", "gpu"] = "cpu"
    created: int = 0
    n_embd: int = 0  # of a token, within the model
    vocab_type: int = 0  # as llama.cpp numbers them; 0 is none
    adapters: tuple[tuple[str, float], ...] = ()  # LoRA files and their scales, as they were given
    hears: bool = False  # writes down speech
    voices: tuple[str, ...] = ()  # with which it speaks, the default first
    languages: tuple[str, ...] = ()  # that it hears or speaks
    image_size: str = ""  # of the images that it draws, by default, such as "512x512"
    inputs: tuple[str, ...] = ()  # what it takes beside text: "image", "audio"

    def __post_init__(self) -> None:
        # A connection file's JSON has lists.
        pairs = tuple((path, scale) for path, scale in self.adapters)
        object.__setattr__(self, "adapters", pairs)
        for name in ("voices", "languages", "inputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def senses(self) -> tuple[str, ...]:
        """Of its ``inputs``, what its messages may hold: a model that draws has no messages."""
        return () if self.use == "draw" else self.inputs

    @property
    def use(self) -> Use:
        """What it is for."""
        if self.hears or self.voices:
            return "hear" if self.hears else "speak"
        if self.image_size:
            return "draw"
        return "embed" if self.embedding_size or self.ranks else "generate"
