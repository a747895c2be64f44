"""One request as its caller sees it: text as it comes, or the whole result. Runs on the caller's thread."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from ..protocol.submission import Update
from .client import Frontend, Job, check_name
from .collector import RequestCollector
from .outputs import RequestOutput, TextDelta


class RequestStream:
    """Iterating gives `TextDelta`s until the request ends; `result()` waits for the whole. For one consumer.

    Leaving the iteration early (`break`, an exception, Ctrl-C) or `close()` aborts the request, and so does dropping an
    iterator: keep the one that `iter` gives for as long as the request is wanted. A stream that is never iterated runs
    to its end. With n > 1 the deltas of all completions come as they are made; `index` says whose each is.
    """

    def __init__(
        self, collector: RequestCollector, updates: "SimpleQueue[Update]", abort: Callable[[str], None]
    ) -> None:
        """Use `LLM.stream`. `updates` is where the request's news comes."""
        self.request_id = collector.request_id
        self._collector, self._updates, self._abort = collector, updates, abort

    def __iter__(self) -> Iterator[TextDelta]:
        """Deltas from here on."""
        try:
            while not self._collector.is_finished:
                yield self._collector.take(self._updates.get())
        finally:
            self.close()

    def result(self) -> RequestOutput:
        """Wait for the end. An interrupt while waiting aborts the request."""
        for _ in self:
            pass
        return self._collector.output()

    def close(self) -> None:
        """Abort unless the request has ended."""
        if not self._collector.is_finished:
            self._abort(self.request_id)


class HandDriven:
    """The requests of one engine that were added by hand. Any thread may add; one thread at a time steps."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        # None wakes a step that waits for a request which could not start.
        self._news: SimpleQueue[tuple[RequestCollector, Update] | None] = SimpleQueue()
        self._running: set[str] = set()
        self._adding, self._stepping = threading.Lock(), threading.Lock()

    @property
    def has_unfinished(self) -> bool:
        """Whether a request was added whose end `step` has not told yet."""
        return bool(self._running)

    def add(self, request_id: str, job: Job) -> None:
        """Start a request.

        Raises:
            ValueError: the name is not a text, is empty, or is in use.
            EngineError: the engine is closed or has failed.
        """
        name = check_name(request_id)
        ticket = self._frontend.ticket(job, lambda collector, update: self._news.put((collector, update)), name)
        with self._adding:
            if request_id in self._running:
                raise ValueError(f"request_id={request_id!r} is in use: step until that request has finished.")
            self._running.add(request_id)
        try:
            self._frontend.start(ticket)
        except BaseException:
            self._running.discard(request_id)
            self._news.put(None)
            raise

    def step(self) -> list[RequestOutput]:
        """Wait for news, and give all requests that have some; none where nothing is unfinished."""
        with self._stepping:
            fresh: dict[RequestCollector, None] = {}  # an ordered set
            while self._running and not fresh:
                self._take(self._news.get(), fresh)
            while not self._news.empty():  # nobody else takes from it
                self._take(self._news.get(), fresh)
            return [collector.output() for collector in fresh]

    def _take(self, news: tuple[RequestCollector, Update] | None, fresh: dict[RequestCollector, None]) -> None:
        if news is None:
            return
        collector, update = news
        collector.take(update)
        fresh[collector] = None
        if collector.is_finished:
            self._running.discard(collector.request_id)
