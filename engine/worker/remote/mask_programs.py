"""Which workers of a crew have the programs that masks over tokens need, and the wait until all that serve have them.

They are made once some request constrains its tokens: those who ask wait for every worker that serves, and from then on
a worker that is started again makes them before it joins (`crew.py`). Invariant: a worker is asked once in an epoch,
unless it has failed. Knows no message and no backend.
"""

import threading
from collections.abc import Callable, Collection, Iterable
from enum import Enum

from ...errors import EngineError


class _Made(Enum):
    """How far a worker has come in its epoch."""

    ASKED = "asked"
    DONE = "done"


class MaskPrograms:
    """The programs for masks of one crew."""

    def __init__(self, changed: threading.Condition, ask: Callable[[int], None], name: Callable[[int], str]) -> None:
        """Ask nobody yet.

        Args:
            changed: the crew's; held around every call of this but `prepare`, and notified when a worker is lost.
            ask: sends a worker the message, without waiting.
            name: names a worker.
        """
        self._changed, self._ask_worker, self._name = changed, ask, name
        self._are_wanted = False
        self._made: dict[int, _Made] = {}  # by worker
        self._why: dict[int, str] = {}  # why a worker could not make them, last

    def prepare(self, serving: Callable[[], Collection[int]], is_closed: Callable[[], bool]) -> None:
        """Have every worker of `serving` make them, and wait until all of those that still serve have, or the crew is
        closed; for a caller's thread.

        Raises:
            EngineError: one could not; names it and says why. The next call tries again.
        """
        with self._changed:
            self._are_wanted = True
            for worker in serving():
                self._ask(worker)

            def is_settled() -> bool:
                return is_closed() or not any(self._made.get(worker) is _Made.ASKED for worker in serving())

            self._changed.wait_for(is_settled)
            failed = [] if is_closed() else self._without(serving())
        if failed:
            raise EngineError(
                f"{self._name(failed[0])} could not compile what structured outputs need: {self._why[failed[0]]}"
            )

    def lacks(self, worker: int) -> bool:
        """Return whether a worker that is about to serve has to make them first, and ask it to."""
        if not self._are_wanted or self._made.get(worker) is _Made.DONE:
            return False
        self._ask(worker)
        return True

    def answered(self, worker: int, why: str | None) -> None:
        """Take in that a worker has them, or why not."""
        if why is None:
            self._made[worker] = _Made.DONE
        else:
            self._made.pop(worker, None)
            self._why[worker] = why
        self._changed.notify_all()

    def forget(self, worker: int) -> None:
        """Take in that a worker is started anew, with nothing."""
        self._made.pop(worker, None)
        self._why.pop(worker, None)

    def _ask(self, worker: int) -> None:
        if worker not in self._made:
            self._made[worker] = _Made.ASKED
            self._ask_worker(worker)

    def _without(self, workers: Iterable[int]) -> list[int]:
        return [worker for worker in workers if self._made.get(worker) is None and worker in self._why]
