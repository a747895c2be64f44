"""Workloads made of others: quicker, longer, of more or of fewer requests. Pairs of lengths and prefixes stay together.

More load of the same kind can mean two things, and they are not the same to a queue. `faster` compresses time: what was
the burst of a minute becomes one of a second, and the index of dispersion of a window becomes that of one so many times
as wide. `superimposed` lets so many groups of users of the same kind come at once, each at another time of the trace:
bursts keep their length, the index of dispersion of a window stays about as it was, and relative to the rate the load
becomes smoother. (Were the copies evenly apart, each window would hold a sample of the whole trace, and nothing would
be left of its bursts: 0.003 for a minute where the trace has 16.)

All are lazy: what they return reads the workload that they were made of again whenever it is iterated over, and
`superimposed` alone keeps it in memory, with 16 bytes for each request of each copy.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from ...protocol.service import is_positive
from ..workload import Workload, WorkRequest
from .lengths import scaled
from .spec_options import MOST_REQUESTS

_SEED = 0  # of the parts by which copies are turned
_SPAN = 2**24  # blocks of one prompt, more than any has


def faster(workload: Workload, factor: float) -> Workload:
    """Return the workload with times and pauses divided by `factor`.

    Raises:
        ValueError: the factor is not above 0.
    """
    _check("faster", factor)
    return replace(workload, name=f"{workload.name}, {factor:g} x as fast", requests=_Faster(workload, factor))


def longer(workload: Workload, factor: float) -> Workload:
    """Return the workload with the lengths of prompts and answers multiplied by `factor`, at least 1 token each.

    What prompts share grows with them, but for what is less than a block.

    Raises:
        ValueError: the factor is not above 0.
    """
    _check("longer", factor)
    block = max(1, int(workload.block_tokens * min(factor, 1.0)))
    name = f"{workload.name}, {factor:g} x as long"
    return Workload(name, _Longer(workload, factor, block), block)


def first(workload: Workload, count: int) -> Workload:
    """Return the workload's first requests.

    Raises:
        ValueError: the count is not above 0.
    """
    _check("limit", count)
    return replace(workload, name=f"{workload.name}, the first {count:,}", requests=_First(workload, count))


def thinned(workload: Workload, share: float, seed: int = 0) -> Workload:
    """Return the workload with each request kept with the probability `share`, and with it those that wait for it.

    Raises:
        ValueError: the share is not above 0, or above 1.
    """
    _check("keep", share)
    if share > 1:
        raise ValueError(f"keep={share:g} is not usable: give a share of the requests, above 0 and at most 1.")
    return replace(workload, name=f"{workload.name}, {share:g} of them", requests=_Thinned(workload, share, seed))


def superimposed(workload: Workload, copies: int) -> Workload:
    """Return so many copies of the workload in the time of one.

    Each copy but the first is turned by a part of the workload's length that is drawn at random, always the same: what
    would come after the end comes at the start. Copies have prefixes and conversations of their own.

    Raises:
        ValueError: the number of copies is not above 0.
    """
    _check("copies", copies)
    return replace(workload, name=f"{workload.name}, {copies} x superimposed", requests=_Superimposed(workload, copies))


def stretched(requests: Iterable[WorkRequest], factor: float) -> list[WorkRequest]:
    """Return requests with all times multiplied by `factor`, 0 or more.

    Raises:
        ValueError: a request waits for another and has no time.
    """
    return [replace(request, at=request.time * factor) for request in requests]


def _check(name: str, factor: float) -> None:
    if not is_positive(factor):
        raise ValueError(f"{name}={factor!r} is not usable: it must be a number above 0.")


@dataclass(frozen=True)
class _Faster:
    workload: Workload
    factor: float

    def __iter__(self) -> Iterator[WorkRequest]:
        for request in self.workload.requests:
            at = None if request.at is None else request.at / self.factor
            yield replace(request, at=at, pause=request.pause / self.factor)


@dataclass(frozen=True)
class _First:
    workload: Workload
    count: int

    def __iter__(self) -> Iterator[WorkRequest]:
        return islice(iter(self.workload.requests), self.count)


@dataclass(frozen=True)
class _Longer:
    workload: Workload
    factor: float
    block: int  # tokens

    def __iter__(self) -> Iterator[WorkRequest]:
        for request in self.workload.requests:
            prompt, output = (scaled(length, self.factor) for length in (request.prompt_len, request.output_len))
            yield replace(request, prompt_len=prompt, output_len=output, blocks=self._blocks(request.blocks))

    def _blocks(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Return an id for each new block: that of the old block in which its end was, and its own place."""
        old = self.workload.block_tokens
        count = -(-round(len(blocks) * old * self.factor) // self.block)
        ends = (np.arange(1, count + 1) * self.block / self.factor - 1e-6) // old
        places = np.minimum(ends, len(blocks) - 1).astype(np.int64)
        return tuple([blocks[place] * _SPAN + new for new, place in enumerate(places.tolist())])


@dataclass(frozen=True)
class _Thinned:
    workload: Workload
    share: float
    seed: int

    def __iter__(self) -> Iterator[WorkRequest]:
        random = np.random.default_rng(self.seed)
        numbers, kept = array("q"), 0  # of each request among those that are kept, or -1
        for request in self.workload.requests:
            after = None if request.after is None else numbers[request.after]
            # One that waits goes with what it waits for; only others are drawn, so that chains stay whole.
            is_kept = random.random() < self.share if after is None else after >= 0
            numbers.append(kept if is_kept else -1)
            if is_kept:
                kept += 1
                yield request if after is None else replace(request, after=after)


@dataclass(frozen=True)
class _Superimposed:
    workload: Workload
    copies: int

    def __iter__(self) -> Iterator[WorkRequest]:
        requests = list(self.workload.requests)
        if len(requests) * self.copies > MOST_REQUESTS:
            raise ValueError(
                f"copies={self.copies} of {len(requests):,} requests are more than the {MOST_REQUESTS:,} that can be "
                "simulated: take fewer."
            )
        starts = _starts(requests)
        length = float(starts.max(initial=0.0))
        offsets = np.random.default_rng(_SEED).random(self.copies) * length
        offsets[0] = 0.0
        times = starts[:, None] + offsets  # [requests, copies]
        times = np.where(times > length, times - length, times).ravel()
        order = np.argsort(times, kind="stable")
        places = np.empty(len(order), np.int64)  # the number of each copy of each request
        places[order] = np.arange(len(order))
        for place in order.tolist():
            number, copy = divmod(place, self.copies)
            yield self._copy(requests[number], copy, float(times[place]), places)

    def _copy(self, request: WorkRequest, copy: int, at: float, places: np.ndarray) -> WorkRequest:
        after = request.after
        return WorkRequest(
            request.prompt_len,
            request.output_len,
            None if request.at is None else at,
            None if after is None else int(places[after * self.copies + copy]),
            request.pause,
            tuple([block * self.copies + copy for block in request.blocks]),
            None if request.session is None else f"{request.session}/{copy}",
            request.service,
        )


def _starts(requests: Sequence[WorkRequest]) -> np.ndarray:
    """Return when each request comes, or what it waits for in the end: [requests], in seconds."""
    starts = np.zeros(len(requests))
    for number, request in enumerate(requests):
        starts[number] = request.at if request.at is not None else starts[request.after or 0]
    return starts
