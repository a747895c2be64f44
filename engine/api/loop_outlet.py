"""From the dispatching thread to an event loop: updates of all the requests that the loop follows, by one wake-up.

Invariants: the loop is woken once for all that a turn of the dispatching thread brings, and not again before it has
taken that; what it has not taken yet is one update a completion, however long it is busy with something else. No
request is forgotten that the loop may still ask for.
"""

import asyncio
import threading
from contextlib import suppress

from ..core.submission import Update
from .collector import RequestCollector
from .outputs import RequestOutput


class Consumer:
    """One request as a coroutine follows it. On its loop's thread alone."""

    def __init__(self, collector: RequestCollector, loop: asyncio.AbstractEventLoop, *, only_final: bool) -> None:
        """`only_final`: give no output before the end."""
        self.collector = collector
        self._loop, self._only_final = loop, only_final
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self.has_update = False

    def take(self, update: Update) -> None:
        """Take in an update, and wake the coroutine."""
        try:
            self.collector.take(update)
        except Exception as error:
            self._error = error
        if self._only_final and self._error is None and not self.collector.is_finished:
            return
        self.has_update = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def next_update(self) -> "asyncio.Future[None]":
        """Give what to await where there is nothing new."""
        self._waiter = self._loop.create_future()
        return self._waiter

    def output(self) -> RequestOutput | None:
        """Return the next output, if it is due. Raises what taking an update in has raised."""
        self.has_update = False
        if self._error is not None:
            raise self._error
        return self.collector.next_output()


class LoopOutlet:
    """The way to one event loop, for all of an engine's requests that it follows."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Consumer, Update]] = {}  # by the completion's id
        self._is_called = False

    def put(self, consumer: Consumer, update: Update) -> "LoopOutlet":
        """Keep an update until `flush`; on the dispatching thread."""
        with self._lock:
            earlier = self._pending.get(update.request_id)
            if earlier is None:
                self._pending[update.request_id] = consumer, update
            else:
                earlier[1].merge(update)
        return self

    def flush(self) -> None:
        """Wake the loop, unless it has been and did not come yet; on the dispatching thread."""
        with self._lock:
            if self._is_called or not self._pending:
                return
            self._is_called = True
        with suppress(RuntimeError):  # a loop that was closed with requests still running takes no updates
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
            self._is_called = False
        for consumer, update in pending.values():
            consumer.take(update)
