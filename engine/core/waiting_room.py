"""How many interactive requests may wait that have never begun, and how long one that finds no room should stay away.

Requests are counted when they are submitted, under the caller's hands, and no more once they have their first seat or
have ended: so a bound is kept however far behind the dispatching thread is. Batch requests do not count, nor do
requests that start over. Those who bring many wait for room in the half of it that they may take, so that they never
keep out for long those who bring one.

Thread-safe. It decides nothing about requests that are in.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

from ..errors import Overloaded
from ..protocol.actions import Action, Chunk, Finish
from ..protocol.results import StepResult
from ..scheduler.scheduler import Scheduler
from .inspection import Observer
from .submission import Submission

_WINDOW = 30.0  # seconds over which the rate of prefill is measured
_LEAST, _MOST = 0.1, 600.0  # seconds that a caller is told to stay away
_UNMEASURED = 1.0  # likewise before anything was measured
_MARGIN = 1.25  # times as long as it should take, since some who were not told come in between
_KEPT = 2.0  # seats are kept for those who are to come back in the time that so many seats take


class WaitingRoom:
    """The room of one engine. No bound: everybody is let in."""

    def __init__(self, most: int | None, most_tokens: int | None, clock: Callable[[], float]):
        """`most` requests wait at once, with `most_tokens` prompt tokens to compute; `clock` gives seconds."""
        self._most, self._most_tokens, self._clock = most, most_tokens, clock
        self._changed = threading.Condition()
        self._tokens_of: dict[int, int] = {}  # of each that waits, by its id
        self._tokens = 0
        self._rate = _Rate()
        self._promised: deque[tuple[float, int]] = deque()  # until when callers were sent away, and their tokens
        self._last_seat = 0.0  # seconds in which one of those who were told to come back finds a seat, one by one
        self._stopped = False

    @property
    def is_bounded(self) -> bool:
        """Return whether anybody may be refused."""
        return self._most is not None or self._most_tokens is not None

    # ---- callers

    def enter_or_refuse(self, submissions: Sequence[Submission]) -> None:
        """Let a request's completions in, all or none.

        Raises:
            Overloaded: there is no room.
        """
        with self._changed:
            if not self._has_room(submissions, 1.0, self._kept()):
                raise Overloaded(self._retry_after(_tokens(submissions)))
            self._enter(submissions)

    def enter_when_there_is_room(self, submissions: Sequence[Submission]) -> None:
        """Let in a request of those who bring many, as soon as their half has room or the engine has stopped."""
        with self._changed:
            while not self._stopped and not self._has_room(submissions, 0.5):
                self._changed.wait()
            self._enter(submissions)

    def _enter(self, submissions: Sequence[Submission]) -> None:
        if not self._tokens_of:
            self._rate.begin(self._clock())
        for submission in submissions if self.is_bounded else ():
            if not submission.facts.service.is_batch:
                tokens = _tokens([submission])
                self._tokens_of[submission.facts.id] = tokens
                self._tokens += tokens

    def _kept(self) -> tuple[int, int]:
        """Return how many seats, with how many tokens, are kept for callers who were told to come back about now: else
        new ones would take them all, and most of those told would come in vain."""
        if not self._promised:
            return 0, 0
        now = self._clock()
        while self._promised and self._promised[0][0] <= now:
            self._promised.popleft()
        soon = now + _KEPT * self._last_seat
        kept = [tokens for _, tokens in takewhile(lambda promise: promise[0] <= soon, self._promised)]
        return len(kept), sum(kept)

    def _has_room(self, submissions: Sequence[Submission], share: float, kept: tuple[int, int] = (0, 0)) -> bool:
        """Return whether these fit in a share of the room; what would never fit does where nobody waits."""
        if not self.is_bounded or not self._tokens_of or submissions[0].facts.service.is_batch:
            return True
        most, most_tokens = self._most, self._most_tokens
        count, tokens = len(self._tokens_of) + kept[0], self._tokens + kept[1]
        return (most is None or count + len(submissions) <= max(1, share * most)) and (
            most_tokens is None or tokens + _tokens(submissions) <= share * most_tokens
        )

    def _retry_after(self, tokens: int) -> float:
        """Return the seconds until there is room for this caller, behind those who were sent away before and have not
        come back yet.

        A seat frees when the prompt that waits first is computed: one of the mean length of those that wait, or as many
        as hold the caller's own tokens.
        """
        now = self._clock()
        mean = self._tokens / len(self._tokens_of)
        needed = max(mean, tokens if self._most_tokens is not None else 0)
        ahead = sum([promised for _, promised in self._promised])
        rate = self._rate.at(now)
        seconds = _UNMEASURED if rate is None else _MOST if rate <= 0 else _MARGIN * (ahead + needed) / rate
        self._last_seat = 0.0 if not rate else needed / rate
        seconds = min(_MOST, max(_LEAST, seconds))
        if seconds < _MOST:
            self._promised.append((now + seconds, int(needed)))
        return seconds

    # ---- the dispatching thread

    def shorten(self, request_id: int, cached: int) -> None:
        """Count so many tokens of a request that waits no more: they are cached."""
        with self._changed:
            tokens = self._tokens_of.get(request_id)
            if tokens is not None:
                self._tokens_of[request_id] = max(1, tokens - cached)
                self._tokens -= tokens - self._tokens_of[request_id]

    def leave(self, request_ids: Sequence[int]) -> None:
        """Count these no more: they have begun, or ended; those that are not here are ignored."""
        with self._changed:
            for request_id in request_ids:
                self._tokens -= self._tokens_of.pop(request_id, 0)
            self._changed.notify_all()

    def computed(self, t: float, tokens: int) -> None:
        """Note that so many prompt tokens were computed by the time `t`."""
        with self._changed:
            self._rate.add(t, tokens)

    def stop(self) -> None:
        """Let nobody wait for room any more: the engine has stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class RoomKeeper(Observer):
    """Tells the room who has begun and who has ended, and what was computed, from what the engine does."""

    def __init__(self, room: WaitingRoom, scheduler: Scheduler):
        self._room, self._scheduler = room, scheduler

    def received(self, message: object) -> None:
        """See requests come in, and steps end."""
        if isinstance(message, tuple):
            for submission in message:
                self._room.shorten(submission.facts.id, self._scheduler.count_cached(submission.facts.id))
        elif isinstance(message, StepResult):
            tokens = sum([row.length for row in message.rows if isinstance(row, Chunk)])
            if tokens:
                self._room.computed(message.t, tokens)

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """See who has a seat for the first time, or has ended."""
        ended = [action.request_id for action in actions if isinstance(action, Finish)]
        if ended or scheduler.seated:
            self._room.leave([*scheduler.seated, *ended])


class _Rate:
    """Prompt tokens computed a second: of the last `_WINDOW` seconds, as far as somebody waited in them."""

    def __init__(self) -> None:
        self._computed: deque[tuple[float, int]] = deque()
        self._sum, self._since = 0, 0.0
        self._has_computed = False
        self._last: float | None = None  # the rate when it was last known

    def begin(self, now: float) -> None:
        """Note that from now on somebody waits."""
        self._last = self.at(now)
        self._since, self._sum = now, 0
        self._computed.clear()

    def add(self, t: float, tokens: int) -> None:
        """Count tokens."""
        self._has_computed |= tokens > 0
        self._computed.append((t, tokens))
        self._sum += tokens
        while self._computed[0][0] < t - _WINDOW:
            self._sum -= self._computed.popleft()[1]

    def at(self, now: float) -> float | None:
        """Return the rate; None: it was never known."""
        while self._computed and self._computed[0][0] < now - _WINDOW:
            self._sum -= self._computed.popleft()[1]
        start = max(self._since, now - _WINDOW)
        if self._sum and now > start:
            return self._sum / (now - start)
        return 0.0 if now - start >= _WINDOW and self._has_computed else self._last


def _tokens(submissions: Sequence[Submission]) -> int:
    """Count the prompt tokens to compute: of completions that share a prompt, all of it once."""
    return sum(1 if submission.facts.fork_of is not None else submission.facts.prompt_len for submission in submissions)
