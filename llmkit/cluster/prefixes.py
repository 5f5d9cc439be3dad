"""What a prompt begins with, as a chain of hashes: what tells which replica has computed it before.

Pure. Of text, not of tokens: a gateway has no tokenizer.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b

from llmkit.protocol import GenerationRequest

__all__ = ["BLOCK_BYTES", "MAX_BLOCKS", "PrefixChain", "chain_of", "chained"]

BLOCK_BYTES = 1024
MAX_BLOCKS = 64
# A message's end is a block's too, if the block has so much: then a conversation's next turn
# begins with all the blocks of this one.
MIN_BLOCK_BYTES = 128


@dataclass(frozen=True, slots=True)
class PrefixChain:
    """Hashes of a prompt's beginnings, each over all that is before it.

    ``ends`` are their lengths and ``size`` the whole prompt's, in bytes; ``whole`` is the hash of
    all of it. Two prompts with a mark in common are the same up to there. In a conversation
    ``opening`` is the hash up to its first question, the same in all its turns, and ``past`` the
    bytes that the turn before asked with; else both are 0.
    """

    marks: tuple[int, ...]
    ends: tuple[int, ...]
    size: int
    whole: int
    opening: int = 0
    past: int = 0

    def depth_at(self, size: float) -> int:
        """How many blocks end within the first ``size`` bytes."""
        return bisect_right(self.ends, size)


def chain_of(request: GenerationRequest) -> PrefixChain:
    """The chain of a request: what keeps caches apart comes first, then tools, then the prompt.

    Sound and media are in it by their digests.
    """
    roles = [message.role for message in request.messages or ()]
    before = 1 + (request.prompt is not None) + (request.suffix is not None)
    opening = past = 0
    if "user" in roles:
        opening = before + roles.index("user") + 1
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        past = before + answers[-1] if answers else 0
    return chained(_pieces(request), opening, past)


def chained(pieces: Iterable[bytes], opening: int = 0, past: int = 0) -> PrefixChain:
    """The chain of a text in pieces; blocks end where pieces do, or are full.

    A conversation's first question ends the first ``opening`` pieces, and the turn before had the
    first ``past`` of them.

    >>> one, other = chained([b"x" * 2000, b"and"]), chained([b"x" * 2000, b"but"])
    >>> one.ends, one.marks == other.marks, one.whole == other.whole
    ((1024, 2000), True, False)
    """
    marks: list[int] = []
    ends: list[int] = []
    size, held = 0, 0  # of the block that is open
    state = blake2b(digest_size=8)
    opened = begun = 0
    for number, piece in enumerate(pieces, 1):
        view = memoryview(piece)
        while view:
            full = len(marks) == MAX_BLOCKS
            part = view if full else view[: BLOCK_BYTES - held]
            state.update(part)
            view = view[len(part) :]
            size, held = size + len(part), held + len(part)
            if not full and (held == BLOCK_BYTES or (not view and held >= MIN_BLOCK_BYTES)):
                marks.append(int.from_bytes(state.digest()))
                ends.append(size)
                held = 0
        if number == opening:
            opened = int.from_bytes(state.digest())
        if number == past:
            begun = size
    whole = int.from_bytes(state.digest())
    if not marks:  # too short for a block
        return PrefixChain((whole,), (size,), size, whole, opened, begun)
    return PrefixChain(tuple(marks), tuple(ends), size, whole, opened, begun)


def _pieces(request: GenerationRequest) -> Iterator[bytes]:
    """The text of a request. A first piece that is short goes into the block of the second."""
    head = [request.salt, repr(request.lora)]
    head += [
        f"{t.name}\0{t.description}\0{json.dumps(t.parameters, default=str)}" for t in request.tools
    ]
    if request.template_options:
        head.append(repr(request.template_options))
    if request.saying is not None:
        head.append(repr(request.saying))
    if request.drawing is not None:
        head.append(repr(request.drawing))
    if request.hearing is not None:
        options = asdict(replace(request.hearing, audio=b""))
        head += [blake2b(request.hearing.audio, digest_size=16).hexdigest(), repr(options)]
    yield _bytes("\0".join(head))
    if isinstance(request.prompt, tuple):
        yield repr(request.prompt).encode()
    elif request.prompt is not None:
        yield _bytes(request.prompt)
    if request.suffix is not None:
        yield _bytes(f"\0{request.suffix}")
    for message in request.messages or ():
        said = [message.role, message.text, *(m.digest for m in message.media)]
        said += [f"{call.name}\0{call.arguments}" for call in message.tool_calls]
        yield _bytes("\0".join(said))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
