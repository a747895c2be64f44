"""Requests of callers that are in the engine, by the names that callers gave them."""

import threading
from collections.abc import Callable

from ..protocol.submission import Update
from .collector import RequestCollector

# Where news of a request goes; called on the dispatching thread, so it must not block.
type Post = Callable[[RequestCollector, Update], None]


class LiveRequests:
    """Names of the requests in the engine, each with the engine's names for its completions that still run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, dict[str, None]] = {}  # inner: an ordered set
        self._owner: dict[str, str] = {}
        self._holder: dict[str, RequestCollector] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a request or a completion has this name."""
        return name in self._running or name in self._owner

    def add(self, collector: RequestCollector) -> None:
        """Take a request's names.

        Raises:
            ValueError: one of them is in use.
        """
        request_id, sequence_ids = collector.request_id, collector.sequence_ids
        with self._lock:
            if any(name in self for name in (request_id, *sequence_ids)):
                raise ValueError(f"request_id={request_id!r} is in use: give each running request its own.")
            self._running[request_id] = dict.fromkeys(sequence_ids)
            self._owner.update(dict.fromkeys(sequence_ids, request_id))
            self._holder[request_id] = collector

    def end(self, sequence_id: str) -> None:
        """A completion has ended; a name no longer in use is ignored."""
        with self._lock:
            owner = self._owner.pop(sequence_id, None)
            if owner is None:
                return
            del self._running[owner][sequence_id]
            if not self._running[owner]:
                del self._running[owner], self._holder[owner]

    def sequences(self, request_id: str) -> list[str]:
        """The completions of a request that still run, in order; none for a name that is not in use."""
        with self._lock:
            return list(self._running.get(request_id, ()))

    def holder(self, request_id: str) -> RequestCollector | None:
        """Who has this name now."""
        with self._lock:
            return self._holder.get(request_id)


class Forward:
    """A sink that passes news on to the caller, and notes when a completion is over."""

    def __init__(self, post: Post, collector: RequestCollector, live: LiveRequests) -> None:
        self._post, self._collector, self._live = post, collector, live

    def put(self, update: Update) -> None:
        """Pass one update on."""
        if update.finish_reason is not None:
            self._live.end(update.request_id)
        self._post(self._collector, update)
