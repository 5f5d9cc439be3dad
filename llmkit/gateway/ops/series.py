"""Numbers by labels, kept for a scrape: counters, and histograms that take several at once.

Plain dictionaries, written by the Tornado loop alone: a request costs some microseconds.
`prometheus_client` makes text of them. Its own histograms take one value at a time, and nothing may
be done for each token.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

__all__ = ["Counter", "Histogram", "Names", "Series"]

MAX_SERIES = 2000  # of one counter
MAX_NAMES = 200
OTHER = "other"


class Names:
    """Model names as label values: at most ``most`` different ones, the rest are "other".

    A label with ever new values would fill the memory of Prometheus.

    >>> names = Names(most=1)
    >>> names("smollm2"), names("qwen"), names("smollm2")
    ('smollm2', 'other', 'smollm2')
    """

    def __init__(self, most: int = MAX_NAMES) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= self._most:
                return OTHER
            known = self._known[name] = name[:200]
        return known


class Counter:
    """A counter ``name`` (Prometheus appends ``_total``) for each combination of label values."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, by: float = 1.0) -> None:
        if labels not in self._values and len(self._values) >= MAX_SERIES:
            labels = (OTHER,) * len(labels)
        self._values[labels] = self._values.get(labels, 0.0) + by

    def family(self) -> CounterMetricFamily:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class Histogram:
    """A histogram for each combination of label values; ``bounds`` are the buckets' upper ends."""

    def __init__(
        self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._bounds = list(bounds)
        self._ends = [*(str(float(b)) for b in bounds), "+Inf"]
        self._values: dict[tuple[str, ...], list[float]] = {}  # counts of the buckets, then the sum
        if not labels:
            self._values[()] = [0.0] * (len(bounds) + 2)

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        """Count ``times`` observations of a value; one that cannot be is left out."""
        if not 0 <= value < math.inf:
            return  # a NaN would stay in the sum, and a sum never falls
        counts = self._values.get(labels)
        if counts is None:
            if len(self._values) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            counts = self._values.setdefault(labels, [0.0] * (len(self._bounds) + 2))
        counts[bisect_left(self._bounds, value)] += times
        counts[-1] += value * times

    def family(self, name: str = "", help: str = "") -> HistogramMetricFamily:
        """The histogram, or the same under another name."""
        family = HistogramMetricFamily(name or self._name, help or self._help, labels=self._labels)
        for labels, counts in self._values.items():
            total, buckets = 0.0, []
            for end, count in zip(self._ends, counts, strict=False):
                total += count
                buckets.append((end, total))
            family.add_metric(labels, buckets, counts[-1])
        return family


class Series:
    """Makes counters and histograms, and lists them for a scrape."""

    def __init__(self) -> None:
        self._all: list[Counter | Histogram] = []

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, help, labels)
        self._all.append(counter)
        return counter

    def histogram(
        self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        histogram = Histogram(name, help, bounds, labels)
        self._all.append(histogram)
        return histogram

    def families(self) -> Iterator[Metric]:
        for series in self._all:
            yield series.family()
