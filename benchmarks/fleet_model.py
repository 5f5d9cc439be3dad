"""What `fleet.py` simulates: replicas that compute as llmkit's engine does, and people who chat.

No clock but the simulated one, and no dice but those given.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from itertools import accumulate, count

from llmkit.cluster.prefixes import MAX_BLOCKS, PrefixChain
from llmkit.cluster.routing import Figures

BLOCK = 256  # tokens of a block of text
BYTES = 4  # of a token
MIN_PREFILL = 16
_serial = count()


def mixed(number: int) -> int:
    """As a hash would be, of 64 bits."""
    return (number * 0x9E3779B97F4A7C15 ^ number << 32) & ((1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds: for a prompt's token, for a step and for each stream in it; ``target_s``: what a
    step may take when there are prompts to compute beside streams."""

    prompt_token_s: float = 0.0005
    step_s: float = 0.020
    stream_s: float = 0.0008
    target_s: float = 0.1

    def step(self, streams: int) -> float:
        return self.step_s + streams * self.stream_s

    def slower(self, by: float) -> Speed:
        return Speed(self.prompt_token_s * by, self.step_s * by, self.stream_s * by, self.target_s)


@dataclass(slots=True)
class Text:
    """Blocks of a conversation so far, or of a system prompt."""

    tokens: int
    marks: list[int]
    ends: list[int]
    opening: int = 0
    past: int = 0  # tokens that the last turn asked with

    def more(self, tokens: int, rng: random.Random) -> None:
        """A message more: its end is a block's too."""
        end = self.tokens + tokens
        for at in (*range(self.tokens + BLOCK, end, BLOCK), end):
            if len(self.marks) < MAX_BLOCKS:
                self.marks.append(rng.getrandbits(64))
                self.ends.append(at * BYTES)
        self.tokens = end

    def chain(self) -> PrefixChain:
        return PrefixChain(
            tuple(self.marks),
            tuple(self.ends),
            self.tokens * BYTES,
            self.marks[-1] ^ self.tokens,
            self.opening,
            self.past * BYTES,
        )


@dataclass(slots=True, eq=False)
class Talk:
    """A conversation: turns left, and all of its text."""

    key: int
    user: int
    system: int
    system_tokens: int
    text: Text
    turns: int
    gateway: int = -1


@dataclass(slots=True, eq=False)
class Job:
    """A request. ``done`` of its ``answer`` tokens were made; ``moves`` replicas lost it."""

    talk: Talk
    chain: PrefixChain
    prompt: int
    answer: int
    arrived: float
    gateway: int
    first_at: float = -1.0
    done: int = 0
    cached: int = 0
    moves: int = 0
    lost_at: float = -1.0
    gap: float = 0.0
    since: float = 0.0  # the replica's count of tokens when it began to decode here
    ticket: object = None
    replica: Replica | None = None
    serial: int = field(default_factory=lambda: next(_serial))


class Replica:
    """Slots, a prefix cache, and time shared between prompts and streams.

    Prompts are computed one after another with what a step leaves beside its streams; all streams
    get a token a step. Time advances by `advance` only.
    """

    def __init__(self, name: str, home: str, speed: Speed, slots: int = 16, keeps: int = 48):
        self.name, self.home, self.speed, self.slots, self.keeps = name, home, speed, slots, keeps
        self.waiting: list[Job] = []
        self.prompts: deque[Job] = deque()
        self.streams: list[tuple[float, int, Job]] = []
        self.left = 0.0  # tokens of the first prompt
        self.tokens, self.at = 0.0, 0.0  # tokens of each stream so far, and until when
        self.cache: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.systems: Counter[int] = Counter()
        self.service: Counter[int] = Counter()
        self.version = 0
        self.state = "ready"

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.prompts) + len(self.streams)

    def figures(self) -> Figures:
        speed = self.speed
        return Figures(
            speed.prompt_token_s,
            speed.step(max(1, len(self.streams))),
            self.slots,
            self.keeps,
            self.load,
        )

    def _rates(self) -> tuple[float, float]:
        """Tokens a second: of the first prompt, and of each stream."""
        n, speed = len(self.streams), self.speed
        if not self.prompts:
            return 0.0, 1 / speed.step(n) if n else 0.0
        if not n:
            return 1 / speed.prompt_token_s, 0.0
        step = speed.step(n)
        chunk = max(MIN_PREFILL, (speed.target_s - step) / speed.prompt_token_s)
        whole = step + min(chunk, max(self.left, 1.0)) * speed.prompt_token_s
        return chunk / (step + chunk * speed.prompt_token_s), 1 / whole

    def advance(self, now: float) -> None:
        prompt, stream = self._rates()
        self.left -= prompt * (now - self.at)
        self.tokens += stream * (now - self.at)
        self.at = now

    def next_at(self) -> float:
        """When something happens next; infinity if nothing does."""
        prompt, stream = self._rates()
        at = math.inf
        if self.prompts:
            at = self.at + max(0.0, self.left) / prompt
        if self.streams:
            at = min(at, self.at + max(0.0, self.streams[0][0] - self.tokens) / stream)
        return at

    def begin(self, job: Job) -> None:
        """Take a request, at the time of the last `advance`."""
        job.replica = self
        self.waiting.append(job)
        self._admit()

    def happen(self, now: float) -> tuple[list[Job], list[Job]]:
        """The requests whose first token is there now, and those that have ended."""
        self.advance(now)
        started, ended = [], []
        if self.prompts and self.left <= 1e-6:
            job = self.prompts.popleft()
            self._keep(job, job.prompt + job.done)
            job.since = self.tokens - 1  # the prompt's last step gives the first token
            heapq.heappush(self.streams, (self.tokens + job.answer - job.done - 1, job.serial, job))
            started.append(job)
            self._next_prompt()
        while self.streams and self.streams[0][0] <= self.tokens + 1e-6:
            job = heapq.heappop(self.streams)[2]
            job.done = job.answer
            self._keep(job, job.prompt + job.answer)
            ended.append(job)
        self._admit()
        return started, ended

    def end(self, now: float) -> list[Job]:
        """It is gone: the requests that it had, with what they got of their answers."""
        self.advance(now)
        for _, _, job in self.streams:
            job.done = min(job.answer - 1, job.done + int(self.tokens - job.since))
        lost = [*(s[2] for s in sorted(self.streams)), *self.prompts, *self.waiting]
        self.waiting, self.streams, self.state = [], [], "gone"
        self.prompts.clear()
        for job in lost:
            job.replica = None
        return lost

    def _admit(self) -> None:
        while self.waiting and len(self.prompts) + len(self.streams) < self.slots:
            # The least served caller first, as the engine does.
            job = min(self.waiting, key=lambda j: (self.service[j.talk.user], j.serial))
            self.waiting.remove(job)
            self.service[job.talk.user] += job.prompt + 2 * job.answer
            self.prompts.append(job)
            if len(self.prompts) == 1:
                self._next_prompt()

    def _next_prompt(self) -> None:
        if self.prompts:
            job = self.prompts[0]
            job.cached = min(self._match(job.talk), job.prompt - 1)
            self.left = float(job.prompt + job.done - job.cached)

    def _match(self, talk: Talk) -> int:
        held = self.cache.get(talk.key)
        if held is not None:
            return held[1]
        return talk.system_tokens if self.systems[talk.system] else 0

    def _keep(self, job: Job, tokens: int) -> None:
        talk = job.talk
        if self.cache.pop(talk.key, None) is None:
            self.systems[talk.system] += 1
        self.cache[talk.key] = (talk.system, tokens)
        while len(self.cache) > self.keeps:
            _, (system, _) = self.cache.popitem(last=False)
            self.systems[system] -= 1


class People:
    """Conversations over Zipf-distributed system prompts; ``hot``: that share of them has one and
    the same long one; ``noisy``: user 0 has ten times as many as others."""

    def __init__(
        self, rng: random.Random, hot: float, noisy: bool, keeps: float, users: int, systems: int
    ) -> None:
        self._rng, self._hot, self._keeps, self._users = rng, hot, keeps, users
        self._weights = list(accumulate(1 / (i + 1) ** 1.1 for i in range(systems)))
        self._noise = 9 / (users + 9) if noisy else 0.0
        self._systems = [self._system(rng.randint(100, 3000)) for _ in range(systems)]
        if hot:
            self._systems.append(self._system(3000))
        self._next = 0

    def _system(self, tokens: int) -> Text:
        text = Text(0, [], [])
        text.more(tokens, self._rng)
        return text

    def talk(self) -> Talk:
        """Somebody begins a conversation."""
        rng = self._rng
        if rng.random() < self._hot:
            system = len(self._systems) - 1
        else:
            [system] = rng.choices(range(len(self._weights)), cum_weights=self._weights)
        known = self._systems[system]
        user = 0 if rng.random() < self._noise else rng.randrange(self._users)
        text = Text(known.tokens, list(known.marks), list(known.ends))
        turns = 1 + int(rng.expovariate(1 / 4))
        self._next += 1
        text.opening = mixed(self._next)
        return Talk(self._next, user, system, known.tokens, text, turns)

    def job(self, talk: Talk, now: float, gateways: int) -> Job:
        """The next turn."""
        rng = self._rng
        talk.turns -= 1
        talk.text.more(rng.randint(20, 300), rng)
        answer = 8 + min(600, int(rng.expovariate(1 / 140)))
        chain = talk.text.chain()
        if talk.gateway < 0 or rng.random() >= self._keeps:
            talk.gateway = rng.randrange(gateways)
        gateway = talk.gateway
        return Job(talk, chain, talk.text.tokens, answer, now, gateway)

    def answered(self, job: Job) -> float | None:
        """The answer is read; seconds until the next turn, or None after the last one."""
        job.talk.text.past = job.talk.text.tokens
        job.talk.text.more(job.answer, self._rng)
        return self._rng.expovariate(1 / 8) if job.talk.turns > 0 else None
