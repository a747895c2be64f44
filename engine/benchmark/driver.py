"""Drives a real engine: each request is sent at its time, or some time after another has ended. Open and closed loops
are one loop, that of `simulation/arrivals.py` under the wall clock.

Invariants: one thread sends; the time of a request is the one that it was due at, so what the driver is late by is in
its latencies and is reported besides (no coordinated omission); prompts are made and checked before they are due. The
dispatching thread only puts ends into a queue. It reads what the engine says of each request and computes no figures.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from ..api.client import EngineClient
from ..api.collector import RequestCollector
from ..api.job import Job
from ..api.sampling_params import SamplingParams
from ..core.submission import Update
from ..errors import Overloaded
from ..metrics.gaps import Gaps
from ..metrics.request_records import RequestRecords
from ..simulation.workload import checked
from .prompts import Prompts
from .tally import Tally
from .target import Load

_LEAD = 0.05  # seconds until the first request, for its prompt to be made


class Driven(NamedTuple):
    """What became of a load's requests."""

    records: RequestRecords  # in the order in which they ended
    gaps: Gaps  # between tokens of requests that ended
    late: list[float]  # seconds by which each request was sent after its time; empty where nobody knows that
    errors: Mapping[str, int]  # what failed requests say, and how often


class _Ended(NamedTuple):
    """The last update of a request."""

    number: int
    update: Update


def drive(client: EngineClient, load: Load, accepted: Mapping[int, float]) -> Driven:
    """Run a load on the engine of `client`.

    Args:
        client: the engine's; its clock is that of all times.
        load: what to run; its warm-up is the caller's.
        accepted: by the engine's id of a request, when it was taken in; an observer fills it meanwhile.

    Raises:
        ValueError: a request that can never be served.
        EngineError: the engine has ended.
    """
    return _Drive(client, load, accepted).run()


class _Drive:
    """One load under way."""

    def __init__(self, client: EngineClient, load: Load, accepted: Mapping[int, float]) -> None:
        self._client, self._accepted = client, accepted
        workload = load.workload
        self._works = list(checked(workload.requests, workload.name, client.config.max_model_len))
        self._stop_after = inf if load.stop_after is None else load.stop_after
        self._prompts = Prompts(client.tokenizer.vocab_size, workload.block_tokens)
        self._following: defaultdict[int, list[int]] = defaultdict(list)  # number -> those that wait for its end
        for number, work in enumerate(self._works):
            if work.after is not None and work.at is None:
                self._following[work.after].append(number)
        self._ended: SimpleQueue[_Ended] = SimpleQueue()
        self._due: list[tuple[float, int]] = []
        self._jobs: dict[int, Job] = {}  # made before they are due
        self._sent: dict[int, tuple[RequestCollector, Job]] = {}  # those that run
        self._answers: dict[int, list[int]] = {}  # of those that run and are gone on with
        self._before: dict[int, np.ndarray] = {}  # by request to come, the tokens that its prompt begins with
        self._tally, self._late = Tally(), list[float]()

    def run(self) -> Driven:
        self._start = self._client.clock() + _LEAD
        timed = ((work.at, number) for number, work in enumerate(self._works) if work.at is not None)
        self._due = [(self._start + at, number) for at, number in timed if at < self._stop_after]
        heapq.heapify(self._due)
        while self._due or self._sent:
            wait = self._time_to_next()
            if wait is not None and wait <= 0:
                self._send(*heapq.heappop(self._due))
                continue
            try:
                self._end(self._ended.get(timeout=wait))
            except Empty:
                continue
        return Driven(self._tally.records, self._tally.gaps, self._late, dict(self._tally.errors))

    def _time_to_next(self) -> float | None:
        """Make the prompt that is due next, and return the seconds until then; None: nothing is due."""
        if not self._due:
            return None
        due, number = self._due[0]
        if number not in self._jobs:
            self._jobs[number] = self._job(number, due)
        return due - self._client.clock()

    def _job(self, number: int, due: float) -> Job:
        work = self._works[number]
        params = SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True, detokenize=False)
        ids = self._prompts.ids(number, work, self._before.pop(number, None))
        job = self._client.check(ids, params, due, work.served)
        return replace(job, tokenised=max(due, job.tokenised or due))

    def _send(self, due: float, number: int) -> None:
        job = self._jobs.pop(number)
        if self._goes_on(number):
            self._answers[number] = []
        ticket = self._client.ticket(job, lambda _, update: self._post(number, update), None, self._works[number].after)
        self._late.append(self._client.clock() - due)
        self._sent[number] = ticket.collector, job
        try:
            self._client.start(ticket, may_refuse=True)
        except Overloaded:
            del self._sent[number]
            self._tally.refuse(number, due, len(job.prompt.ids), job.service.slo)
            self._let_follow(number, None)

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
        answer = self._answers.pop(number, None)
        self._let_follow(
            number, None if answer is None else np.concatenate([job.prompt.ids, np.array(answer, np.int32)])
        )

    def _goes_on(self, number: int) -> bool:
        """Return whether a request that waits for this one goes on with its conversation."""
        session = self._works[number].session
        return session is not None and any(self._works[one].session == session for one in self._following[number])

    def _let_follow(self, number: int, tokens: np.ndarray | None) -> None:
        """Plan those that have waited for a request: a pause after now, when its caller has the end."""
        now = self._client.clock()
        for one in self._following.pop(number, ()):
            work = self._works[one]
            due = now + work.pause
            if due >= self._start + self._stop_after:
                continue
            if tokens is not None and work.session == self._works[number].session:
                self._before[one] = tokens
            heapq.heappush(self._due, (due, one))
