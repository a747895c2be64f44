"""Requests of callers that are in the engine, by the names that callers gave them.

Names end here: the engine knows a request's completions by ids that never come again, so whatever is asked of an id can
only reach the completion that it was asked of.
"""

import threading
from collections.abc import Callable

from ..core.submission import Outlet, Update
from .collector import RequestCollector

# Where updates of a request go; called on the dispatching thread, so it must not block. As `Sink.put` it returns what
# has to be flushed.
type Post = Callable[[RequestCollector, Update], Outlet | None]


class ActiveRequests:
    """The requests in the engine, each under its own name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, ActiveRequest] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def add(self, request: "ActiveRequest") -> None:
        """Add a request under the name that its caller gave it.

        Raises:
            ValueError: its name is in use.
        """
        name = request.collector.request_id
        with self._lock:
            if name in self._by_name:
                raise ValueError(f"request_id={name!r} is in use: give each running request its own.")
            self._by_name[name] = request

    def end(self, request: "ActiveRequest", sequence_id: int) -> None:
        """Note that a completion has ended; the last one frees the request's name. Noting it again does nothing."""
        name = request.collector.request_id
        with self._lock:
            request.sequence_ids.pop(sequence_id, None)
            if not request.sequence_ids and self._by_name.get(name) is request:
                del self._by_name[name]

    def sequences(self, name: str) -> list[int]:
        """Return the ids of a request's completions that still run, in order; none for a name that is not in use."""
        with self._lock:
            request = self._by_name.get(name)
            return [] if request is None else list(request.sequence_ids)

    def all_sequences(self) -> list[int]:
        """Return the ids of all completions that run."""
        with self._lock:
            return [one for request in self._by_name.values() for one in request.sequence_ids]


class ActiveRequest:
    """One request: the sink of its completions, which passes their updates on to the caller."""

    def __init__(self, post: Post, collector: RequestCollector, active: ActiveRequests) -> None:
        self.collector = collector
        self.sequence_ids = dict.fromkeys(collector.sequence_ids)  # those that still run, in order
        self._post, self._active = post, active

    def put(self, update: Update) -> Outlet | None:
        """Pass one update on."""
        if update.finish_reason is not None:
            self._active.end(self, update.request_id)
        return self._post(self.collector, update)
