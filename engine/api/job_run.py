"""Many jobs through one engine: a window of them runs at once, and results come as they finish. It blocks the thread
that iterates, so that `LLM` and `AsyncLLM` can share it.

Invariants: a job that has entered is yielded once, or aborted when the iteration is left; jobs enter in their order.
What a job is, and how its result is made, is elsewhere.
"""

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing
from queue import Empty, SimpleQueue

from msgspec.structs import replace

from ..core.submission import Update
from ..protocol.service import Service
from .client import EngineClient
from .collector import RequestCollector
from .job import Job
from .outputs import RequestOutput


class JobRun:
    """One run over jobs. It is for one thread: `promote` is called between two results."""

    def __init__(
        self,
        client: EngineClient,
        jobs: Iterable[Job | None],
        window: int | None,
        *,
        is_batch: bool = False,
        due: float | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            client: the engine's.
            jobs: read as they are needed; None: no job is ready yet, and it is asked for again after an update. Where
                nothing runs, None ends the run.
            window: how many may be in the engine at once; None: all.
            is_batch: whether they use what interactive requests leave.
            due: of batch jobs, the instant on the engine's clock by which they are wanted.
        """
        self.tokens = 0  # computed so far: prompts, as soon as they are answered, and what was generated
        self.asked = 0  # the most tokens, prompts included, that jobs which have entered may come to
        self.entered = 0  # jobs
        self.promoted = 0  # of them, those that run as interactive ones although they are batch jobs
        self._client, self._jobs, self._window = client, iter(jobs), window
        self._is_batch, self._due = is_batch, due
        self._is_promoted, self._indices = False, itertools.count()
        self._running: dict[RequestCollector, tuple[int, Service]] = {}  # their indices, and how they are served
        self._unanswered: set[RequestCollector] = set()
        # One completion of each job that has ended and whose place is still free: the next job to come waited for it.
        self._ended: deque[int] = deque()
        self._updates: SimpleQueue[tuple[RequestCollector, Update]] = SimpleQueue()

    def outputs(self, every: float | None = None) -> Generator[tuple[int, RequestOutput] | None, None, None]:
        """Yield index and result of each job as it finishes; None about every `every` seconds, if that is given.

        Raises as `results`.
        """
        with closing(self.results(every)) as results:
            for result in results:
                yield None if result is None else (result[0], result[1].output())

    def results(self, every: float | None = None) -> Generator[tuple[int, RequestCollector] | None, None, None]:
        """Yield index and collector of each job as it finishes; None about every `every` seconds, if that is given.

        Leaving the iteration early aborts what is left.

        Raises:
            ValueError: a job that the engine cannot run; those before it are aborted.
            EngineError: the engine is closed or has failed.
        """
        clock = self._client.clock
        last = clock()
        try:
            while True:
                self._fill()
                if not self._running:
                    return
                collector = self._take(every)
                if collector is not None and collector.is_finished:
                    index, _ = self._running.pop(collector)
                    self._unanswered.discard(collector)
                    if self._window is not None:
                        self._ended.append(collector.sequence_ids[-1])
                    yield index, collector
                if every is not None and (now := clock()) - last >= every:
                    last = now
                    yield None
        finally:
            for collector in self._running:
                self._client.withdraw(collector)

    def promote(self) -> None:
        """Run batch jobs as interactive ones from here on, those in the engine included, which keep their tokens."""
        self._is_promoted = True
        for collector, (_, service) in self._running.items():
            self._client.serve(collector, replace(service, is_batch=False, due=None))
            self.promoted += 1

    def _fill(self) -> None:
        """Start jobs, as far as the window goes."""
        while self._window is None or len(self._running) < self._window:
            job = next(self._jobs, None)
            if job is None:
                self._ended.clear()  # whatever comes later waited for something else
                return
            service = job.service
            if self._is_promoted:
                self.promoted += 1
            elif self._is_batch:
                service = replace(service, is_batch=True, due=self._due)
            ticket = self._client.ticket(
                job.served(service),
                lambda collector, update: self._updates.put((collector, update)),
                after=self._ended.popleft() if self._ended else None,
            )
            self._running[ticket.collector] = next(self._indices), service
            self._client.start(ticket)
            self._unanswered.add(ticket.collector)
            self.entered += 1
            self.asked += len(job.prompt.ids) + sum(submission.facts.max_tokens for submission in ticket.submissions)

    def _take(self, every: float | None) -> RequestCollector | None:
        """Take in one update, and return whose it is; None: none came in time."""
        try:
            collector, update = self._updates.get(timeout=every)
        except Empty:
            return None
        collector.take(update)
        self.tokens += len(update.token_ids)
        if update.token_ids and collector in self._unanswered:
            self._unanswered.discard(collector)
            self.tokens += len(collector.prompt.ids)
        return collector
