"""Which replica takes a request: the one that is expected to need the fewest seconds for it.

Pure policy: no I/O, no clock and no dice of its own, so `benchmarks/fleet.py` runs this very class.
Not thread-safe.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

from llmkit.cluster.homes import Homes
from llmkit.cluster.prefixes import PrefixChain
from llmkit.cluster.replica import Figures, Replica, Ticket

__all__ = ["Figures", "Router", "Ticket"]

MAX_HOLDERS, NUM_HOMES, NUM_RANDOM = 4, 2, 2
FEW = MAX_HOLDERS + NUM_HOMES + NUM_RANDOM  # so many are all asked
MAX_HELD = 1_000_000  # blocks of all replicas together: about 100 MB
SMOOTHING = 0.05
SLACK = 1.1  # a template adds text that the chain does not count
SLACK_BYTES = 256
# Until the first figures and answers are in.
FIRST_PROMPT_TOKEN_S, FIRST_STEP_S = 0.002, 0.02
FIRST_BYTES_PER_TOKEN, FIRST_ANSWER_TOKENS, FIRST_WORK_TOKENS = 4.0, 128.0, 256.0
FIRST_FOUND = 0.5
TURNS = 4  # of a conversation, that are still to come
NOTHING = PrefixChain((0,), (0,), 0, 0)


class Router:
    """Chooses among replicas. Times are seconds of whatever clock the caller has.

    >>> router = Router(random.Random(1))
    >>> router.add("a"), router.add("b")
    (None, None)
    >>> from llmkit.cluster.prefixes import chained
    >>> chain = chained([b"You are a helpful assistant. " * 50])
    >>> first = router.route(chain)
    >>> router.ended(first, prompt_tokens=400, cached_tokens=0, answer_tokens=10)
    >>> router.route(chain).replica == first.replica
    True
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._replicas: dict[str, Replica] = {}
        self._open: list[Replica] = []
        self._homes = Homes()
        self._index: dict[int, list[Replica]] = {}
        self._num_held = 0
        self._bytes_per_token = FIRST_BYTES_PER_TOKEN
        self._answer_tokens, self._work_tokens = FIRST_ANSWER_TOKENS, FIRST_WORK_TOKENS
        self._prompt_token_s, self._step_s = FIRST_PROMPT_TOKEN_S, FIRST_STEP_S
        # Of later turns: the share whose earlier ones other gateways sent somewhere, and the share
        # of those that was found at home.
        self._strange, self._found = 0.0, FIRST_FOUND

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def num_open(self) -> int:
        """Replicas that take requests."""
        return len(self._open)

    @property
    def num_held(self) -> int:
        """Blocks in the index, counted for each replica that holds them."""
        return self._num_held

    def add(self, name: str, home: str | None = None) -> None:
        """A replica that takes requests. Gateways that give it the same ``home`` choose alike."""
        if name in self._replicas:
            return
        replica = self._replicas[name] = Replica(name)
        self._homes.add(name, home or name)
        self._admit(replica)

    def remove(self, name: str) -> None:
        """It is gone, and what it held with it."""
        replica = self._replicas.pop(name, None)
        if replica is None:
            return
        self._dismiss(replica)
        self._homes.remove(name)
        while replica.prefixes:
            self._drop(replica, next(iter(replica.prefixes)))

    def close(self, name: str) -> None:
        """It takes no more requests, but may still have some: it drains, say."""
        replica = self._replicas.get(name)
        if replica is not None:
            self._dismiss(replica)

    def open(self, name: str) -> None:
        """It takes requests again."""
        replica = self._replicas.get(name)
        if replica is not None and replica.place < 0:
            self._admit(replica)

    def report(self, name: str, figures: Figures) -> None:
        """A replica's news of itself."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        replica.figures, replica.since = figures, 0
        if figures.prompt_token_s > 0:
            self._prompt_token_s += SMOOTHING * (figures.prompt_token_s - self._prompt_token_s)
        if figures.step_s > 0:
            self._step_s += SMOOTHING * (figures.step_s - self._step_s)
        while len(replica.prefixes) > max(figures.prefixes, figures.slots):
            self._drop(replica, next(iter(replica.prefixes)))

    def route(
        self, chain: PrefixChain, *, answered: int = 0, avoid: Collection[str] = ()
    ) -> Ticket | None:
        """The replica for a request that was ``answered`` with so many tokens already; None if
        none takes requests. Those to ``avoid`` only take it when there is no other."""
        best: tuple[float, Replica, int, float] | None = None
        is_strange = self._is_strange(chain)
        home, away = self._home(chain)
        for replica in self._candidates(chain, avoid, home):
            depth = self._depth(replica, chain)
            matched = float(chain.ends[depth - 1] if depth else 0)
            if is_strange and replica is home and matched < chain.past:
                matched += self._found * (chain.past - matched)
            work = (chain.size - matched) / self._bytes_per_token + answered + 1
            cost = self._cost(replica, work)
            if home is not None and replica is not home and matched <= chain.past:
                cost += away
            if best is None or cost < best[0]:
                best = cost, replica, depth, work
        if best is None:
            return None
        _, replica, depth, work = best
        replica.own += 1
        replica.since += 1
        replica.pending += work
        is_new = chain.marks[-1] not in replica.prefixes
        instead_of = self._note(replica, chain.marks)
        is_guess = is_strange and replica is home
        return Ticket(replica.name, chain, depth, work, replica, is_guess, is_new, instead_of)

    def beside(self, ticket: Ticket) -> Ticket:
        """Another answer to the same prompt, at the same replica: computed once."""
        ticket._of.own += 1
        ticket._of.since += 1
        return Ticket(ticket.replica, ticket.chain, ticket.depth, 0.0, ticket._of)

    def spread(self, avoid: Collection[str] = ()) -> Ticket | None:
        """A replica for what has no prefix: the less busy of two."""
        able = [r for r in self._any(NUM_RANDOM) if r.name not in avoid]
        able = able or [r for r in self._open if r.name not in avoid] or list(self._open)
        if not able:
            return None
        replica = min(able, key=lambda r: r.load / r.figures.slots)
        replica.own += 1
        replica.since += 1
        return Ticket(replica.name, NOTHING, 0, 0.0, replica)

    def started(self, ticket: Ticket) -> None:
        """Its first token is there."""
        if ticket._pending:
            ticket._pending = False
            ticket._of.pending = max(0.0, ticket._of.pending - ticket.work)

    def refused(self, ticket: Ticket) -> None:
        """It has ended, and nothing of it was computed: it is not held there."""
        if ticket._ended:
            return
        self.ended(ticket)
        replica, last = ticket._of, ticket.chain.marks[-1]
        if not ticket._noted or self._replicas.get(ticket.replica) is not replica:
            return
        if last in replica.prefixes:
            self._drop(replica, last)
        for marks in ticket._instead_of:
            self._note(replica, marks)

    def ended(
        self,
        ticket: Ticket,
        *,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        answer_tokens: int = 0,
    ) -> None:
        """It has ended; with tokens counted, the index learns what was really cached."""
        if ticket._ended:
            return
        self.started(ticket)
        ticket._ended = True
        replica, chain = ticket._of, ticket.chain
        replica.own -= 1
        replica.since -= 1
        if not prompt_tokens:
            return
        self._answer_tokens += SMOOTHING * (answer_tokens - self._answer_tokens)
        self._work_tokens += SMOOTHING * (prompt_tokens - cached_tokens - self._work_tokens)
        ratio = chain.size / prompt_tokens
        true_size = cached_tokens * ratio * SLACK + SLACK_BYTES
        if ticket._is_guess:
            self._found += SMOOTHING * ((true_size >= chain.past) - self._found)
        self._bytes_per_token += SMOOTHING * (min(max(ratio, 1.0), 16.0) - self._bytes_per_token)
        true_depth = chain.depth_at(true_size)
        if true_depth < ticket.depth and self._replicas.get(ticket.replica) is replica:
            # What shared more than that with it is no longer there.
            lost = chain.marks[true_depth]
            for last, marks in list(replica.prefixes.items()):
                shares = len(marks) > true_depth and marks[true_depth] == lost
                if shares and last != chain.marks[-1]:
                    self._drop(replica, last)

    def _cost(self, replica: Replica, work: float) -> float:
        """Seconds until its first token, and what the others on that replica lose by it."""
        figures, load = replica.figures, replica.load
        token_s = figures.prompt_token_s or self._prompt_token_s
        step_s = figures.step_s or self._step_s
        slots = max(1, figures.slots)
        waits = load + 1 - slots
        cost = (work + replica.pending) * token_s * (1 + min(load, slots) / slots) + load * step_s
        if waits > 0:
            service_s = self._answer_tokens * step_s + self._work_tokens * token_s
            cost += waits * service_s / slots
        return cost

    def _is_strange(self, chain: PrefixChain) -> bool:
        """Whether it goes on with what no replica is known to have."""
        if not chain.past:
            return False
        depth = chain.depth_at(chain.past)
        is_strange = not depth or chain.marks[depth - 1] not in self._index
        self._strange += SMOOTHING * (is_strange - self._strange)
        return is_strange

    def _home(self, chain: PrefixChain) -> tuple[Replica | None, float]:
        """Where a conversation belongs, and the seconds that it may cost to compute it elsewhere:
        later turns that come to other gateways look for it there."""
        found = self._homes.of(chain, len(self._replicas))
        if found is None:
            return None, 0.0
        point, is_whole = found
        lost = self._answer_tokens + self._work_tokens
        if is_whole:  # those that begin alike are nowhere else
            lost += chain.size / self._bytes_per_token
        return next(self._near(point), None), self._strange * TURNS * lost * self._prompt_token_s

    def _near(self, point: int) -> Iterator[Replica]:
        """Those that all gateways find there and that take requests; some several times."""
        return (r for r in map(self._replicas.__getitem__, self._homes.near(point)) if r.place >= 0)

    def _candidates(
        self, chain: PrefixChain, avoid: Collection[str], home: Replica | None
    ) -> Iterator[Replica]:
        if len(self._open) <= FEW:
            found = self._open
        else:
            chosen = dict.fromkeys(self._holders(chain))
            chosen.update(dict.fromkeys(self._first_homes(chain.marks[0])))
            chosen.update(dict.fromkeys(self._any(NUM_RANDOM)))
            if home is not None:
                chosen[home] = None
            found = list(chosen)
        wanted = [r for r in found if r.name not in avoid]
        if not wanted and avoid:
            wanted = [r for r in self._open if r.name not in avoid] or list(self._open)
        return iter(wanted)

    def _holders(self, chain: PrefixChain) -> list[Replica]:
        """Some that hold the most of it."""
        chosen: list[Replica] = []
        for mark in reversed(chain.marks):
            holders = self._index.get(mark)
            if holders is None:
                continue
            if len(holders) > FEW:
                holders = [self._rng.choice(holders) for _ in range(MAX_HOLDERS)]
            for replica in holders:
                if replica.place >= 0 and replica not in chosen:
                    chosen.append(replica)
                    if len(chosen) == MAX_HOLDERS:
                        return chosen
        return chosen

    def _first_homes(self, mark: int) -> list[Replica]:
        """The replicas that all gateways choose for a first block that none holds."""
        homes: list[Replica] = []
        for replica in self._near(mark):
            if replica not in homes:
                homes.append(replica)
                if len(homes) == NUM_HOMES:
                    break
        return homes

    def _any(self, count: int) -> list[Replica]:
        return [self._rng.choice(self._open) for _ in range(count)] if self._open else []

    @staticmethod
    def _depth(replica: Replica, chain: PrefixChain) -> int:
        """How many blocks of it a replica holds: who holds one, holds those before it."""
        held, marks = replica.held, chain.marks
        if not held or marks[0] not in held:
            return 0
        low, high = 1, len(marks)
        while low < high:
            middle = (low + high + 1) // 2
            if marks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def _note(self, replica: Replica, marks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """From now on it holds this, in place of what it continues, which is returned."""
        last = marks[-1]
        if last in replica.prefixes:
            replica.prefixes.move_to_end(last)
            return ()
        held = replica.held
        for mark in marks:
            count = held.get(mark)
            if count is None:
                held[mark] = 1
                self._num_held += 1
                self._index.setdefault(mark, []).append(replica)
            else:
                held[mark] = count + 1
        continued = tuple(replica.prefixes[mark] for mark in marks[:-1] if mark in replica.prefixes)
        for each in continued:
            self._drop(replica, each[-1])
        replica.prefixes[last] = marks
        most = max(replica.figures.prefixes, replica.figures.slots)
        while len(replica.prefixes) > most or (
            self._num_held > MAX_HELD and len(replica.prefixes) > 1
        ):
            self._drop(replica, next(iter(replica.prefixes)))
        return continued

    def _drop(self, replica: Replica, last: int) -> None:
        held = replica.held
        for mark in replica.prefixes.pop(last):
            count = held[mark] - 1
            if count:
                held[mark] = count
                continue
            del held[mark]
            self._num_held -= 1
            holders = self._index[mark]
            holders.remove(replica)
            if not holders:
                del self._index[mark]

    def _admit(self, replica: Replica) -> None:
        replica.place = len(self._open)
        self._open.append(replica)

    def _dismiss(self, replica: Replica) -> None:
        """Take it from those that take requests; the last one gets its place."""
        if replica.place < 0:
            return
        last = self._open.pop()
        if last is not replica:
            self._open[replica.place] = last
            last.place = replica.place
        replica.place = -1
