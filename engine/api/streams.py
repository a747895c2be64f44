"""Requests as their callers follow them, on the callers' threads: one as a stream, or several step by step."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from ..core.submission import Update
from .client import EngineClient, check_name
from .collector import RequestCollector
from .job import Job
from .outputs import RequestOutput, TextDelta


class RequestStream:
    """One request as it runs: iterating yields `TextDelta`s until it ends, `result()` waits for the whole.

    A stream is for one consumer.

    Leaving the iteration early (`break`, an exception, Ctrl-C) or `close()` aborts the request, and so does dropping an
    iterator: keep the one that `iter` gives for as long as the request is wanted. A stream that is never iterated runs
    to its end. With n > 1 the deltas of all completions come as they are made, each with its completion's `index`.
    """

    def __init__(
        self, collector: RequestCollector, updates: "SimpleQueue[Update]", abort: Callable[[RequestCollector], None]
    ) -> None:
        """Follow a request that `LLM.stream` started: its updates come in `updates`, and `abort` ends it."""
        self.request_id = collector.request_id
        self._collector, self._updates, self._abort = collector, updates, abort

    def __iter__(self) -> Iterator[TextDelta]:
        """Yield the deltas from here on."""
        try:
            while not self._collector.is_finished:
                update = self._updates.get()
                text = self._collector.take(update)
                index = self._collector.sequence_ids.index(update.request_id)
                parts = self._collector.newest_parts(update.request_id)
                yield TextDelta(text, update.token_ids, update.finish_reason, index, *(parts or ()))
        finally:
            self.close()

    def result(self) -> RequestOutput:
        """Wait for the end and return the whole result. An interrupt while waiting aborts the request."""
        for _ in self:
            pass
        return self._collector.output()

    def close(self) -> None:
        """Abort the request unless it has ended."""
        if not self._collector.is_finished:
            self._abort(self._collector)


class HandDriven:
    """The requests of one engine that were added by hand. Any thread may add; one thread at a time steps."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        # None wakes a step that waits for a request which could not start.
        self._updates: SimpleQueue[tuple[RequestCollector, Update] | None] = SimpleQueue()
        self._running: set[str] = set()
        self._adding, self._stepping = threading.Lock(), threading.Lock()

    @property
    def has_unfinished(self) -> bool:
        """Return whether a request was added whose end `step` has not returned yet."""
        return bool(self._running)

    @property
    def unfinished(self) -> int:
        """Return how many there are of these."""
        return len(self._running)

    def add(self, request_id: str, job: Job) -> None:
        """Start a request.

        Raises:
            ValueError: the name is not a text, is empty, or is in use.
            EngineError: the engine is closed or has failed.
            Overloaded: as many requests wait as may.
        """
        name = check_name(request_id)
        ticket = self._client.ticket(job, lambda collector, update: self._updates.put((collector, update)), name)
        with self._adding:
            if request_id in self._running:
                raise ValueError(f"request_id={request_id!r} is in use: step until that request has finished.")
            self._running.add(request_id)
        try:
            self._client.start(ticket, may_refuse=True)
        except BaseException:
            self._running.discard(request_id)
            self._updates.put(None)
            raise

    def step(self) -> list[RequestOutput]:
        """Wait for outputs, and give those of all requests that have one; none where nothing is unfinished."""
        with self._stepping:
            outputs: list[RequestOutput] = []
            while not outputs:
                fresh: dict[RequestCollector, None] = {}  # an ordered set
                while self._running and not fresh:
                    self._take(self._updates.get(), fresh)
                while not self._updates.empty():  # no other thread takes from it
                    self._take(self._updates.get(), fresh)
                outputs = [output for collector in fresh if (output := collector.next_output()) is not None]
                if not self._running:
                    break
            return outputs

    def _take(self, message: tuple[RequestCollector, Update] | None, fresh: dict[RequestCollector, None]) -> None:
        if message is None:
            return
        collector, update = message
        collector.take(update)
        fresh[collector] = None
        if collector.is_finished:
            self._running.discard(collector.request_id)
