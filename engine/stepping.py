"""Requests driven by hand, as with vLLM's `LLMEngine`: added one by one, looked at with `step`.

The engine runs on its own thread whether anyone looks or not; `step` waits for news and hands it over.
"""

import threading
from queue import SimpleQueue

from .collect import RequestCollector
from .frontend import Frontend, Job, check_name
from .outputs import RequestOutput
from .submission import Update


class HandDriven:
    """The requests of one engine that were added by hand. Any thread may add; one thread at a time steps."""

    def __init__(self, frontend: Frontend) -> None:
        """None yet."""
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
