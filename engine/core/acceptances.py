"""When requests were taken in: the callers' clock stops there, and the scheduler's begins.

An observer on the dispatching thread, so it does little. It decides nothing.
"""

from collections.abc import Callable

from .inspection import Observer
from .submission import Submission


class Acceptances(Observer):
    """Times by the engine's id of a request, since this began to observe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with none; `clock` is the engine's."""
        self._clock = clock
        self.accepted: dict[int, float] = {}

    def received(self, message: object) -> None:
        """See requests that are taken in."""
        if isinstance(message, tuple):
            now = self._clock()
            self.accepted.update((one.facts.id, now) for one in message if isinstance(one, Submission))
