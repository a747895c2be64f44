"""Histograms over all requests since start-up, with fixed buckets, as Prometheus wants them.

The dispatching thread only keeps what has ended; it is counted a batch at a time, in a few calls of numpy, or by
whoever reads. Requests that run are counted by the reader, up to the tokens that they had. Invariant: nothing that was
read once is ever less when it is read again, since sums are whole nanoseconds: a sum of floats would depend on its
order, and a scraper takes a counter that shrinks for one that began anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..protocol.timeline import Timeline

_BATCH = 64  # ended requests that are counted at once
_NANOSECONDS = 1e9
_DECADES = (1.0, 2.5, 5.0)

Quantity = Literal["ttft", "itl", "tpot", "e2e", "queue", "handoff", "prompt", "output"]


def _seconds(least: int, most: int) -> tuple[float, ...]:
    """List 1, 2.5 and 5 times each power of ten from `least` on, and 10 to the `most`, in seconds."""
    steps = [float(f"{digit}e{power}") for power in range(least, most) for digit in _DECADES]
    return (*steps, float(f"1e{most}"))


def _powers(most: int) -> tuple[float, ...]:
    return tuple(float(2**power) for power in range(most + 1))


# Upper ends of the buckets, each inclusive: seconds, and tokens for the last two.
BUCKETS: dict[Quantity, tuple[float, ...]] = {
    "ttft": _seconds(-3, 3),
    "itl": _seconds(-4, 1),
    "tpot": _seconds(-4, 1),
    "e2e": _seconds(-2, 4),
    "queue": _seconds(-4, 3),
    "handoff": _seconds(-4, 1),
    "prompt": _powers(20),
    "output": _powers(17),
}


_ENDS = {name: np.array(bounds) for name, bounds in BUCKETS.items()}


@dataclass(frozen=True)
class Histogram:
    """Values of one quantity, counted."""

    bounds: tuple[float, ...]  # upper ends of the buckets, each inclusive
    counts: tuple[int, ...]  # in each bucket, and above the last
    total: float  # of the values, in seconds or tokens


class Seen(NamedTuple):
    """A request and what of it counts."""

    timeline: Timeline
    tokens: int  # the first so many that it generated
    prompt_len: int
    has_finished: bool = False  # it ran to its end


class Observed:
    """What was counted; `add` is for one thread, and so is all else for the owner of a `snapshot`."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._counts = {name: np.zeros(len(bounds) + 1, np.int64) for name, bounds in BUCKETS.items()}
        self._sums = dict.fromkeys(BUCKETS, 0)  # nanoseconds or tokens
        self._ended: list[Seen] = []  # not counted yet

    def add(self, seen: Seen) -> None:
        """Take in a request that has ended."""
        self._ended.append(seen)
        if len(self._ended) >= _BATCH:
            self._count(self._ended)
            self._ended = []

    def snapshot(self, running: Sequence[Seen] = ()) -> "Observed":
        """Return a copy that stays as it is, with requests that run besides."""
        twin = Observed()
        twin._counts = {name: counts.copy() for name, counts in self._counts.items()}
        twin._sums, twin._ended = self._sums.copy(), [*self._ended, *running]
        return twin

    def histograms(self) -> dict[Quantity, Histogram]:
        """Return what was counted so far, by quantity."""
        if self._ended:
            self._count(self._ended)
            self._ended = []
        return {
            name: Histogram(
                BUCKETS[name],
                tuple(counts.tolist()),
                float(self._sums[name]) if name in ("prompt", "output") else self._sums[name] / _NANOSECONDS,
            )
            for name, counts in self._counts.items()
        }

    def _count(self, requests: Sequence[Seen]) -> None:
        answered = [seen for seen in requests if seen.tokens]
        # A slice is a copy, made at once: what runs gets more tokens meanwhile.
        stamps = [np.asarray(seen.timeline.tokens[: seen.tokens], np.float64) for seen in answered]
        if stamps:
            joined = np.concatenate(stamps)
            ends = np.cumsum([len(one) for one in stamps])
            first, last = joined[np.concatenate([[0], ends[:-1]])], joined[ends - 1]  # [answered]
            self._add("itl", np.delete(np.diff(joined), ends[:-1] - 1))
            arrival = np.array([seen.timeline.arrival for seen in answered])
            started = np.array([_or(seen.timeline.prefill_start, seen.timeline.arrival) for seen in answered])
            self._add("ttft", first - arrival)
            self._add("queue", started - arrival)
            several = np.array([seen.has_finished and seen.tokens > 1 for seen in answered])
            tokens = np.array([seen.tokens for seen in answered])
            self._add("tpot", (last - first)[several] / (tokens[several] - 1))
        finished = [seen for seen in requests if seen.has_finished]
        self._add("e2e", np.array([_or(seen.timeline.e2e, 0.0) for seen in finished]))
        self._add("handoff", np.array([h for seen in finished if (h := seen.timeline.handoff) is not None]))
        self._add("prompt", np.array([seen.prompt_len for seen in finished]), unit=1)
        self._add("output", np.array([seen.tokens for seen in finished]), unit=1)

    def _add(self, name: Quantity, values: np.ndarray, unit: float = _NANOSECONDS) -> None:
        ends = _ENDS[name]
        self._counts[name] += np.bincount(np.searchsorted(ends, values), minlength=len(ends) + 1)
        self._sums[name] += int(np.rint(np.maximum(values, 0) * unit).astype(np.int64).sum())


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
