"""A thread that waits for arrays to be computed and reports each, in the order given.

Waiting releases the GIL, so the dispatching thread never blocks on a device and nothing polls. A waiter only reads; it
dispatches nothing.
"""

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import jax

from ..host.threads import EngineThread
from .jax_settings import own_settings


class Waiter:
    """A thread for one stream of results: a mesh's steps, or the transfers that leave it."""

    def __init__(self, name: str) -> None:
        """Start the thread; it is a daemon, so a program that forgets `close` still ends."""
        self._queue: SimpleQueue[tuple[Any, Callable[[Any], None], Callable[[Exception], None]] | None] = SimpleQueue()
        self.thread = EngineThread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def watch[T](self, arrays: T, ready: Callable[[T], None], failed: Callable[[Exception], None]) -> None:
        """Call `ready(arrays)` on the waiter's thread once they are computed, or `failed` with what was raised."""
        self._queue.put((arrays, ready, failed))

    def close(self) -> None:
        """Finish what is queued, then join the thread."""
        self._queue.put(None)
        self.thread.join()

    def _run(self) -> None:
        with own_settings():
            self._wait()

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            arrays, ready, failed = item
            try:
                jax.block_until_ready(arrays)
                ready(arrays)
            except Exception as error:
                failed(error)
            del item, arrays, ready, failed  # a queue that runs dry must not keep the last arrays alive
