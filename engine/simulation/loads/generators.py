"""Loads made by rule: every one a pure function of its options and a seed, however often it is iterated over.

Requests of open loops come at times of their own, whatever becomes of earlier ones; in closed loops (`closed`, `lanes`)
they wait for them. Times and lengths have random streams of their own: another rate leaves the lengths as they were.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from ..workload import LATEST, Workload, WorkRequest
from .arrival_times import ArrivalTimes, Rate
from .conversations import BLOCK, LONGEST_SYSTEM, MOST_SYSTEMS, LanesOfConversations, OpenConversations, Talk
from .lengths import Lengths, Pairs, Uniform
from .spec_options import Options

_DAY = 86400.0
_MOST_PERIODS = 12_000  # of a load that rises and falls
_AT_ONCE = 4096  # requests of a closed loop whose lengths are drawn together


@dataclass(frozen=True)
class OpenLoop:
    """Requests that come at times of their own, and share nothing."""

    times: ArrivalTimes
    lengths: Lengths
    seed: int

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the requests."""
        when, sizes = (np.random.default_rng((self.seed, stream)) for stream in (0, 1))
        for times in self.times.draw(when):
            pairs = self.lengths.draw(sizes, len(times))
            for (prompt, output), at in zip(pairs.tolist(), times.tolist(), strict=True):
                yield WorkRequest(prompt, output, at)


@dataclass(frozen=True)
class ClosedLoop:
    """So many users, each of whom sends the next request some time after the answer to the last one."""

    concurrency: int
    count: int  # requests of all users together
    lengths: Lengths
    think: float  # seconds, the mean of an exponential distribution
    seed: int

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the requests; request i is of user i modulo `concurrency`."""
        sizes, thought = (np.random.default_rng((self.seed, stream)) for stream in (1, 2))
        for begin in range(0, self.count, _AT_ONCE):
            count = min(_AT_ONCE, self.count - begin)
            pairs = self.lengths.draw(sizes, count).tolist()
            pauses = thought.exponential(self.think, count).tolist() if self.think > 0 else [0.0] * count
            for number, ((prompt, output), pause) in enumerate(zip(pairs, pauses, strict=True), begin):
                if number < self.concurrency:
                    yield WorkRequest(prompt, output, 0.0)
                else:
                    yield WorkRequest(prompt, output, None, number - self.concurrency, pause)


type ReadTrace = Callable[[str], Workload]
type MakeRate = Callable[[Options, float], Rate]
type Make = Callable[[str, Options, ReadTrace], Workload]


def _open_loop(rate: MakeRate, *, has_cv: bool = True, needs_seconds: bool = False) -> Make:
    """Return what makes an open loop; `rate` is given the options and how many seconds the load lasts at most."""

    def make(name: str, options: Options, read: ReadTrace) -> Workload:
        seconds, count = _until(options, needs_seconds=needs_seconds)
        cv = options.number("cv", 1.0, may_be_0=True) if has_cv else 1.0
        times = ArrivalTimes(rate(options, seconds), cv, seconds, count)
        options.check_requests(times.expected)
        return Workload(name, OpenLoop(times, lengths_of(options, read), options.seed()))

    return make


def _until(options: Options, *, needs_seconds: bool = False) -> tuple[float, int | None]:
    """Take how long a load lasts: so many seconds, so many requests, or what comes first."""
    count = options.count("requests") if options.has("requests") else None
    return options.number("seconds", inf if count is not None and not needs_seconds else None, most=LATEST), count


def _steady(options: Options, seconds: float) -> Rate:
    return Rate.steady(options.number("rate"))


def _ramp(options: Options, seconds: float) -> Rate:
    return Rate.ramp(options.number("rate"), options.number("to", may_be_0=True), seconds)


def _spike(options: Options, seconds: float) -> Rate:
    begin, length = options.number("begin", may_be_0=True), options.number("length")
    return Rate.spike(options.number("rate"), options.number("factor"), begin, length)


def _diurnal(options: Options, seconds: float) -> Rate:
    depth = options.number("depth", 0.8, most=1.0)
    period = options.number("period", _DAY, above=seconds / _MOST_PERIODS)
    return Rate.diurnal(options.number("rate"), depth, period, seconds)


def _closed(name: str, options: Options, read: ReadTrace) -> Workload:
    users, count = options.count("concurrency"), options.count("requests")
    options.check_requests(count)
    think = options.number("think", 0.0, may_be_0=True)
    loop = ClosedLoop(users, count, lengths_of(options, read), think, options.seed())
    return Workload(name, loop)


def _sessions(name: str, options: Options, read: ReadTrace) -> Workload:
    return _conversations(name, options, _talk(options, read, options.number("think", may_be_0=True)))


def _agents(name: str, options: Options, read: ReadTrace) -> Workload:
    return _conversations(name, options, _talk(options, read, options.number("tool", may_be_0=True)))


def _talk(options: Options, read: ReadTrace, pause: float) -> Talk:
    return Talk(
        lengths_of(options, read),
        turns=options.span("turns", most=10_000),
        pause=pause,
        system=options.count("system", 0, least=0, most=LONGEST_SYSTEM),
        systems=options.count("systems", 1, most=MOST_SYSTEMS),
        opening=options.span("opening") if options.has("opening") else None,
        longest=options.count("longest") if options.has("longest") else None,
    )


def _conversations(name: str, options: Options, talk: Talk) -> Workload:
    """Make conversations in lanes where `lanes` is given, else at times of their own."""
    if options.has("lanes"):
        lanes = LanesOfConversations(talk, options.count("lanes"), options.count("conversations"), options.seed())
        options.check_requests(max(lanes.lanes, lanes.count * talk.turns[0]))
        return Workload(name, lanes, BLOCK)
    count = options.count("conversations") if options.has("conversations") else None
    seconds = options.number("seconds", None if count is None else inf, most=LATEST)
    times = ArrivalTimes(Rate.steady(options.number("rate")), options.number("cv", 1.0, may_be_0=True), seconds, count)
    options.check_requests(times.expected * talk.turns[0])
    return Workload(name, OpenConversations(talk, times, options.seed()), BLOCK)


def lengths_of(options: Options, read: ReadTrace) -> Lengths:
    """Take lengths: spans of `input` and `output`, or pairs of the trace `lengths`."""
    if options.has("lengths"):
        return Pairs.of(read(options.text("lengths")).requests)
    return Uniform(options.span("input"), options.span("output"))


GENERATORS: dict[str, Make] = {
    "poisson": _open_loop(_steady, has_cv=False),
    "gamma": _open_loop(_steady),
    "ramp": _open_loop(_ramp, needs_seconds=True),
    "spike": _open_loop(_spike),
    "diurnal": _open_loop(_diurnal, needs_seconds=True),
    "closed": _closed,
    "sessions": _sessions,
    "agents": _agents,
}
