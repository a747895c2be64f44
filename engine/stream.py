"""One request as its caller sees it: text as it comes, or the whole result. Runs on the caller's thread."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue

from .collect import RequestCollector
from .outputs import RequestOutput, TextDelta
from .submission import Update


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
