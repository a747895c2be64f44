"""The deadline of a batch run: it says once, as soon as it is predicted, how late the run will be, and goes on; or has
its lines run as interactive ones from then on. Nothing is dropped. The arithmetic is in `forecast.py`."""

from math import isinf
from typing import Literal, Protocol, get_args

from ..api.service_options import check_deadline
from ..host.progress import duration, say
from .forecast import Forecast, Standing
from .summary import BatchResult

type OnLate = Literal["say", "promote"]
ON_LATE: tuple[str, ...] = get_args(OnLate.__value__)
# Seconds between two looks.
EVERY = 1.0


class Running(Protocol):
    """What is asked of a run in the engine (`api/job_run.py`)."""

    tokens: int
    asked: int
    entered: int
    promoted: int

    def promote(self) -> None:
        """Run all lines as interactive ones from here on."""
        ...


def check_late(deadline: object, on_late: object) -> None:
    """Check what was said of a run's deadline.

    Raises:
        ValueError: a deadline that is no number above 0, or an `on_late` that is unknown or goes with no deadline.
    """
    if deadline is not None:
        check_deadline(deadline)
    if on_late not in ON_LATE:
        raise ValueError(f"on_late={on_late!r} is unknown: it is {' or '.join(map(repr, ON_LATE))}.")
    if deadline is None and on_late != "say":
        raise ValueError(f"on_late={on_late!r} needs a deadline: give deadline=, in seconds.")


class Watch:
    """A watch over one run with a deadline."""

    def __init__(self, run: Running, result: BatchResult, total: int | None, due: float, start: float, on_late: OnLate):
        """Begin at `start`; `total`: lines with a result in the end, None for an input that cannot be counted."""
        self._run, self._result, self._total, self._on_late = run, result, total, on_late
        self._due, self._forecast, self._done_before = due, Forecast(start, due), result.finished

    def look(self, now: float) -> None:
        """See how far the run has come, and speak where it will be late and that was not said."""
        result = self._result
        result.promoted = self._run.promoted
        if result.predicted_late is None:
            late = self._forecast.look(now, self._standing())
            if late is not None:
                result.predicted_late = late
                self._speak(late)

    def end(self, now: float) -> None:
        """Note by how much the run was late."""
        self._result.promoted = self._run.promoted
        self._result.late = max(0.0, now - self._due)

    def _standing(self) -> Standing:
        run, result = self._run, self._result
        done = result.finished - self._done_before
        left = max(0, run.entered - done) if self._total is None else self._total - result.finished
        tokens_done = result.prompt_tokens + result.completion_tokens
        return Standing(run.tokens, left, done, tokens_done, run.asked / max(1, run.entered))

    def _speak(self, late: float) -> None:
        """Say how late the run will be, and do what was asked for that case."""
        if isinf(late):
            what = "interactive requests left nothing over lately, so this run will miss its deadline"
        else:
            what = f"this run will end about {duration(late)} after its deadline, by what was left over lately"
        then = "it goes on"
        if self._on_late == "promote":
            self._run.promote()
            self._result.promoted = self._run.promoted
            then = "its lines run as interactive requests from here on"
        say(f"batch: {what}; {then}.")
