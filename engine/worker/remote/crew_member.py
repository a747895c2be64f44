"""One worker as its crew keeps it: how far it has come, when it was heard, and when it is to be started again.

Bookkeeping alone: `crew.py` holds its lock around every change, starts and ends what is kept here, and tells others.
"""

from dataclasses import dataclass
from enum import Enum

from ...protocol.worker import Place, WorkerHandle

MOST_TRIES = 5  # starts in a row that come to nothing, until a worker is given up
FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0  # seconds before a worker is started again, each time twice as long
_START_SECONDS = 180.0  # of silence while a worker starts: loading libraries and files may hold up all its threads
_LONG_AGO = 60.0  # seconds after which a loss makes the next pause no longer


class Stage(Enum):
    """How far a worker has come."""

    DOWN = "down"  # it waits to be started again
    CHECKING = "checking"
    CHECKED = "checked"
    LOADING = "loading"
    SERVING = "serving"
    GIVEN_UP = "given up"


@dataclass(eq=False)
class CrewMember:
    """One worker."""

    index: int
    place: Place
    epoch: int = -1
    handle: WorkerHandle | None = None
    stage: Stage = Stage.DOWN
    heard: float | None = None  # when something was heard of this epoch last; None: nothing yet
    begun: float = 0.0  # when this epoch was started
    due: float = 0.0  # when to start it again
    found: bytes = b""  # what it has found when it checked
    why: str | None = None  # why it does not serve
    tries: int = 0  # starts in a row that came to nothing
    losses: int = 0  # in the last minute or so
    compiled: int = 0

    @property
    def is_there(self) -> bool:
        """Return whether it was started and has not been lost since."""
        return self.stage not in (Stage.DOWN, Stage.GIVEN_UP)

    def begin(self, epoch: int, now: float) -> None:
        """Note that it is started, in this epoch."""
        self.epoch, self.stage, self.heard, self.begun = epoch, Stage.CHECKING, None, now

    def serve(self) -> None:
        """Note that it serves."""
        self.stage, self.tries, self.why = Stage.SERVING, 0, None

    def lose(self, why: str, now: float) -> WorkerHandle | None:
        """Note that it is lost, and until when it waits, unless its starts have come to nothing too often; return what
        is left of it, to be ended."""
        self.tries += self.stage is not Stage.SERVING
        self.stage, self.why = (Stage.GIVEN_UP if self.tries >= MOST_TRIES else Stage.DOWN), why
        self.losses += 1
        self.due = now + min(FIRST_PAUSE * 2 ** (self.losses - 1), _LONGEST_PAUSE)
        handle, self.handle = self.handle, None
        return handle

    def silence(self, now: float) -> float:
        """Return for how many seconds nothing was heard of it."""
        return now - (self.begun if self.heard is None else self.heard)

    def may_be_silent(self, timeout: float) -> float:
        """Return for how many seconds it may be: `timeout` where it serves, longer while it starts."""
        return timeout if self.stage is Stage.SERVING else max(_START_SECONDS, timeout)

    def forgive(self, now: float) -> None:
        """Forget its losses once it has served for long enough."""
        if self.stage is Stage.SERVING and now - self.begun > _LONG_AGO:
            self.losses = 0
