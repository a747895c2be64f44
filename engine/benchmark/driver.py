"""Drives a real engine: each request is sent at its time, or some time after another has ended. Open and closed loops
are one loop, that of `simulation/arrivals.py` under the wall clock.

Invariants: one thread sends; the time of a request is the one that it was due at, so what the driver is late by is in
its latencies and is reported besides (no coordinated omission); prompts are made and checked before they are due
(`ready.py`). The dispatching thread only puts ends into a queue. Requests that fail or are refused are records like any
other. It reads what the engine says of each request and computes no figures.

Python hands its lock to a thread that waits for it after a switch interval, 5 ms as it starts: so late a sender would
be whenever the dispatching thread is busy. While a load runs the interval is shorter, as it is for every caller.
"""

import heapq
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from ..api.client import EngineClient, Ticket
from ..api.collector import RequestCollector
from ..api.job import Job
from ..core.submission import Update
from ..errors import Overloaded
from ..metrics.gaps import Gaps
from ..metrics.request_records import RequestRecords
from ..simulation.workload import WorkRequest, checked
from .prompts import Prompts
from .ready import Ready
from .tally import Tally
from .target import Load

LEAD = 0.05  # seconds until the load begins
_SWITCH = 0.0002  # seconds after which a thread that waits gets Python's lock
_IDLE = 0.002  # seconds until the next request from which on another is made ahead


class Driven(NamedTuple):
    """What became of a load's requests."""

    records: RequestRecords  # in the order in which they ended
    gaps: Gaps  # between tokens of requests that ended
    late: list[float]  # seconds by which each was in the engine's hands after its time; empty where nobody knows that
    errors: Mapping[str, int]  # what failed requests say, and how often


class _Ended(NamedTuple):
    """The last update of a request."""

    number: int
    update: Update


def drive(
    client: EngineClient,
    load: Load,
    accepted: Mapping[int, float],
    *,
    seed: tuple[int, ...] = (0,),
    start: float | None = None,
) -> Driven:
    """Run a load on the engine of `client`.

    Args:
        client: the engine's; its clock is that of all times.
        load: what to run; its warm-up is the caller's.
        accepted: by the engine's id of a request, when it was taken in; an observer fills it meanwhile.
        seed: of the prompts' tokens; another one shares nothing with what the engine may have in its prefix cache.
        start: when the load begins; None: as soon as the first requests are made, which takes up to some seconds.

    Raises:
        ValueError: a request that can never be served.
        EngineError: the engine has ended.
    """
    driven = _Drive(client, load, accepted, seed)
    if start is None:
        driven.make_ahead()
        start = client.clock() + LEAD
    with quick_switches():
        return driven.run(start)


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads that wait for Python's lock have it sooner, until the `with` block ends."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Drive:
    """One load under way."""

    def __init__(self, client: EngineClient, load: Load, accepted: Mapping[int, float], seed: tuple[int, ...]) -> None:
        self._client, self._accepted = client, accepted
        workload = load.workload
        self._works = list(checked(workload.requests, workload.name, client.config.max_model_len))
        self._stop_after = inf if load.stop_after is None else load.stop_after
        self._following: defaultdict[int, list[int]] = defaultdict(list)  # number -> those that wait for its end
        going_on: set[int] = set()  # those whose prompts begin with the answer before them
        for number, work in enumerate(self._works):
            if work.after is not None and work.at is None:
                self._following[work.after].append(number)
                if _goes_on(self._works[work.after], work, workload.block_tokens):
                    going_on.add(number)
        self._going_on = frozenset(going_on)
        prompts = Prompts(client.tokenizer.vocab_size, workload.block_tokens, seed)
        self._ready = Ready(client, self._works, prompts, self._going_on, self._ticket)
        self._ended: SimpleQueue[_Ended] = SimpleQueue()
        self._due: list[tuple[float, int]] = []
        self._sent: dict[int, tuple[RequestCollector, Job]] = {}  # those that run
        self._ids: dict[int, int] = {}  # the engine's, of those that were sent
        self._answers: dict[int, list[int]] = {}  # of those that run and are gone on with
        self._tally, self._late = Tally(), list[float]()

    def make_ahead(self) -> None:
        """Make as many requests as may lie ready."""
        while self._ready.make_next():
            pass

    def run(self, start: float) -> Driven:
        self._end_of_load = start + self._stop_after
        timed = ((work.at, number) for number, work in enumerate(self._works) if work.at is not None)
        self._due = [(start + at, number) for at, number in timed if at < self._stop_after]
        heapq.heapify(self._due)
        while self._due or self._sent:
            wait = self._time_to_next()
            if wait is not None and wait <= 0:
                self._send(*heapq.heappop(self._due))
            elif (wait is None or wait > _IDLE) and self._ended.empty() and self._ready.make_next():
                continue
            else:
                try:
                    self._end(self._ended.get(timeout=wait))
                except Empty:
                    continue
        return Driven(self._tally.records, self._tally.gaps, self._late, dict(self._tally.errors))

    def _time_to_next(self) -> float | None:
        """Make what is due next, and return the seconds until then; None: nothing is due."""
        if not self._due:
            return None
        due, number = self._due[0]
        self._ready.make(number)
        return due - self._client.clock()

    def _send(self, due: float, number: int) -> None:
        work = self._works[number]
        after = None if work.at is not None or work.after is None else self._ids.get(work.after)
        ticket, job = self._ready.take(number, due, after)
        self._ids[number] = ticket.collector.sequence_ids[0]
        if any(one in self._going_on for one in self._following.get(number, ())):
            self._answers[number] = []
        self._sent[number] = ticket.collector, job
        try:
            self._client.start(ticket, may_refuse=True)
        except Overloaded:
            del self._sent[number]
            self._tally.refuse(number, due, len(job.prompt.ids), job.service.slo)
            self._answers.pop(number, None)
            self._let_follow(number, None)
        self._late.append(self._client.clock() - due)

    def _ticket(self, number: int, job: Job) -> Ticket:
        return self._client.ticket(job, lambda _, update: self._post(number, update))

    def _post(self, number: int, update: Update) -> None:
        """On the dispatching thread: keep the tokens of answers that are gone on with, and pass the end on."""
        answer = self._answers.get(number)
        if answer is not None:
            answer += update.token_ids
        if update.finish_reason is not None:
            self._ended.put(_Ended(number, update))

    def _end(self, ended: _Ended) -> None:
        number, update = ended
        collector, job = self._sent.pop(number)
        self._record(number, update, collector, job)
        answer = self._answers.pop(number, None)
        tokens = None if answer is None else np.concatenate([job.prompt.ids, np.array(answer, np.int32)])
        self._let_follow(number, tokens)

    def _record(self, number: int, update: Update, collector: RequestCollector, job: Job) -> None:
        line, reason = update.timeline, update.finish_reason
        assert line is not None
        assert reason is not None
        self._tally.end(
            number,
            len(job.prompt.ids),
            line,
            reason,
            taken_in=self._accepted.get(collector.sequence_ids[0]),
            cached_len=update.cache.cached_tokens if update.cache is not None else 0,
            error=update.error,
            slo=job.service.slo,
        )

    def _let_follow(self, number: int, tokens: np.ndarray | None) -> None:
        """Plan those that have waited for a request: a pause after now, when its caller has the end."""
        now = self._client.clock()
        for one in self._following.pop(number, ()):
            due = now + self._works[one].pause
            if due >= self._end_of_load:
                continue
            if one in self._going_on:
                self._ready.make(one, tokens)
            heapq.heappush(self._due, (due, one))


def _goes_on(first: WorkRequest, then: WorkRequest, block_tokens: int) -> bool:
    """Return whether the prompt of `then` begins with that of `first` and its answer: it is the conversation's next
    turn, and block ids, if there are any, go on over the answer. A recorded turn has its own ids in the answer's place.
    """
    if then.session is None or then.session != first.session:
        return False
    count = len(first.blocks)
    covers = count * block_tokens >= first.prompt_len + first.output_len
    return not count or (covers and then.blocks[:count] == first.blocks)
