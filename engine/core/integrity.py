"""When an idle engine looks through all that it keeps for what cannot be.

The look takes as long as there are pages, half a second for 131,000 of them, and the next request may come meanwhile.
So it takes no more than a hundredth of the dispatching thread's time. Pure but for the clock that it is given.
"""

from collections.abc import Callable

_WORK_PER_CHECK = 100  # times as long as the last check took, until the next is due


class IdleCheck:
    """Runs a check where the engine is idle, the first time it is and whenever enough was done since the last."""

    def __init__(self, check: Callable[[], None], clock: Callable[[], float]) -> None:
        """`clock`: seconds that the calling thread has worked."""
        self._check, self._clock = check, clock
        self._due = 0.0

    def idle(self) -> None:
        """Run the check, if it is due. Raises what it raises."""
        start = self._clock()
        if start < self._due:
            return
        self._check()
        end = self._clock()
        self._due = end + _WORK_PER_CHECK * (end - start)
