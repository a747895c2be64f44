"""The workers of one engine, as its driver keeps them: started, listened to, missed, ended and started again.

A worker counts as lost when its backend says so, when it refuses to go on, or when nothing was heard of it for longer
than `worker_timeout` on the driver's clock, or minutes while it starts, whatever else believes it alive: it is killed
then, so that it cannot come back by itself. Beats go out from a thread that does nothing else, and a worker answers
them on a thread that computes nothing. What was lost is started again after a while, loads what was agreed when the
engine started, and serves under an epoch of its own; whatever an earlier epoch still sends is refused.

Invariant: for each epoch that has served, `lost` is called once before another serves. It knows no scheduler and no
mesh: `remote_executor.py` does.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

from ...host.threads import EngineThread
from ...protocol import wire
from ...protocol.worker import (
    Alive,
    Beat,
    Checked,
    FromWorker,
    Load,
    MasksPrepared,
    Place,
    Prepare,
    PrepareMasks,
    Refused,
    Serving,
    ToWorker,
    WorkerBackend,
    WorkerHandle,
)
from .mask_programs import MaskPrograms

MOST_TRIES = 5  # starts in a row that come to nothing, until a worker is given up
_START_SECONDS = 180.0  # of silence while a worker starts: loading libraries and files may hold up all its threads
FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0  # seconds before a worker is started again, each time twice as long
_LONG_AGO = 60.0  # seconds after which a loss makes the next pause no longer
_BEATS = 5  # in a `worker_timeout`


class Stage(Enum):
    """How far a worker has come."""

    DOWN = "down"  # it waits to be started again
    CHECKING = "checking"
    CHECKED = "checked"
    LOADING = "loading"
    SERVING = "serving"
    GIVEN_UP = "given up"


class Listener(Protocol):
    """Who hears of workers that have served, on any thread, one at a time for each worker."""

    def heard(self, worker: int, message: FromWorker) -> None:
        """Take a message that is not the crew's own."""
        ...

    def unreadable(self, worker: int, why: str) -> None:
        """Take in that something it sent could not be read."""
        ...

    def lost(self, worker: int, why: str) -> None:
        """Take in that a worker that served is gone."""
        ...

    def joined(self, worker: int, epoch: int) -> None:
        """Take in that a worker serves again, with nothing."""
        ...

    def given_up(self, worker: int, why: str) -> None:
        """Take in that a worker will not come back."""
        ...


@dataclass(eq=False)
class _Member:
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


class Crew:
    """All workers of one engine."""

    def __init__(
        self, backend: WorkerBackend, asked: Sequence[bytes], clock: Callable[[], float], timeout: float
    ) -> None:
        """Start nobody yet; `asked` is what each worker is to check, `timeout` is in seconds."""
        self.backend, self._asked, self._clock, self._timeout = backend, asked, clock, timeout
        self._members = [_Member(index, place) for index, place in enumerate(backend.places)]
        self._epochs, self._numbers = itertools.count(1), itertools.count(1)
        self._changed = threading.Condition(threading.RLock())
        self._agreed: bytes | None = None
        self._may_join: Callable[[int, bytes], str | None] = lambda worker, found: None
        self._listener: Listener | None = None
        self._is_closed = False
        self._masks = MaskPrograms(self._changed, self._ask_for_masks, backend.name)
        self._keeper = EngineThread(target=self._keep, name="twinmesh-workers", daemon=True)

    @property
    def places(self) -> Sequence[Place]:
        """Return where each worker stands."""
        return self.backend.places

    @property
    def compiled(self) -> int:
        """Return how often something was compiled in the workers after they began to serve."""
        return sum(member.compiled for member in self._members)

    def stage(self, worker: int) -> Stage:
        """Return how far a worker has come."""
        return self._members[worker].stage

    # ---- the start of an engine

    def check(self) -> list[bytes]:
        """Start every worker, and return what each has found before it loads anything.

        Raises:
            ValueError: one cannot be started or refuses; names it and says why. None is left then.
        """
        with self._changed:
            for member in self._members:
                self._start(member)
        self._keeper.start()
        self._wait_for(Stage.CHECKED)
        return [member.found for member in self._members]

    def load(self, agreed: bytes, may_join: Callable[[int, bytes], str | None]) -> None:
        """Have every worker load and compile, at the same time; return when all serve.

        `may_join` looks at what a worker that is started again has found, and returns why it may not join, if so.
        Raises as `check` does.
        """
        with self._changed:
            self._agreed, self._may_join = agreed, may_join
            for member in self._members:
                self._load(member)
        self._wait_for(Stage.SERVING)

    def epochs(self) -> list[int]:
        """Return each worker's epoch."""
        return [member.epoch for member in self._members]

    def serve(self, listener: Listener) -> None:
        """Tell `listener` of all that happens from here on."""
        with self._changed:
            self._listener = listener
            lost = [member for member in self._members if member.stage is not Stage.SERVING]
        for member in lost:  # since they were loaded
            listener.lost(member.index, member.why or "it has ended.")

    def _wait_for(self, stage: Stage) -> None:
        with self._changed:
            while any(member.stage is not stage for member in self._members):
                failed = next((m for m in self._members if m.stage in (Stage.DOWN, Stage.GIVEN_UP)), None)
                if failed is not None:
                    raise ValueError(f"{self.backend.name(failed.index)} cannot serve: {failed.why}")
                self._changed.wait()

    # ---- while it runs

    def epoch(self, worker: int) -> int:
        """Return the epoch of a worker's last start."""
        return self._members[worker].epoch

    def wait_until_it_serves(self, worker: int, after: int = 0, timeout: float | None = None) -> bool:
        """Wait until a worker serves in an epoch later than `after`; return False if it does not in `timeout` seconds,
        or never will."""
        member = self._members[worker]

        def is_settled() -> bool:
            serves = member.stage is Stage.SERVING and member.epoch > after
            return serves or member.stage is Stage.GIVEN_UP or self._is_closed

        with self._changed:
            return self._changed.wait_for(is_settled, timeout) and member.stage is Stage.SERVING

    def prepare_masks(self) -> None:
        """Have every worker that serves compile what masks over tokens need, and wait for it, on the calling thread;
        those that join later have it by then. Raises as `MaskPrograms.prepare` does."""
        self._masks.prepare(
            lambda: [member.index for member in self._members if member.stage is Stage.SERVING],
            lambda: self._is_closed,
        )

    def send(self, worker: int, message: ToWorker) -> None:
        """Send a message to a worker, unless it is of an epoch that has ended."""
        member = self._members[worker]
        handle = member.handle
        if handle is not None and member.epoch == message.epoch:
            handle.send(wire.encode(message))

    def close(self) -> None:
        """End all workers, and wait for their end. Calling it again does nothing."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        self.backend.close()
        if self._keeper.ident is not None:
            self._keeper.join()

    # ---- one worker

    def _start(self, member: _Member) -> None:
        epoch = member.epoch = next(self._epochs)
        member.stage, member.heard, member.begun = Stage.CHECKING, None, self._clock()
        index = member.index
        self._masks.forget(index)
        received, ended = partial(self._received, index, epoch), partial(self._ended, index, epoch)
        try:
            member.handle = self.backend.start(index, epoch, received, ended)
        except ValueError as error:
            self._lose(member, str(error))
            return
        self.send(index, Prepare(epoch, index, member.place, self._asked[index]))

    def _load(self, member: _Member) -> None:
        assert self._agreed is not None
        if member.stage is Stage.CHECKED:
            member.stage = Stage.LOADING
            self.send(member.index, Load(member.epoch, self._agreed))

    def _received(self, worker: int, epoch: int, data: bytes) -> None:
        """Take in what a worker has sent, on a thread of the backend's."""
        member = self._members[worker]
        if member.epoch != epoch or member.stage in (Stage.DOWN, Stage.GIVEN_UP):
            return
        member.heard = self._clock()
        try:
            message = wire.decode_from_worker(data)
        except wire.WireError as error:
            why = f"what {self.backend.name(worker)} sent could not be read: {error}"
            if member.stage is Stage.SERVING and self._listener is not None:
                self._listener.unreadable(worker, why)
            else:
                self._end(member, epoch, why)
            return
        if message.epoch == epoch:
            self._take(member, message)

    def _take(self, member: _Member, message: FromWorker) -> None:
        match message:
            case Alive(compiled=compiled):
                member.compiled = compiled
            case Checked(found=found):
                self._checked(member, found)
            case Serving():
                self._serves(member)
            case MasksPrepared(why=why):
                self._prepared(member, why)
            case Refused(why=why, epoch=epoch):
                self._end(member, epoch, why)
            case _ if self._listener is not None:
                self._listener.heard(member.index, message)

    def _checked(self, member: _Member, found: bytes) -> None:
        with self._changed:
            member.found, member.stage = found, Stage.CHECKED
            self._changed.notify_all()
            if self._agreed is None:  # the engine starts, and waits for all
                return
            why = self._may_join(member.index, found)
            if why is None:
                self._load(member)
        if why is not None:
            self._end(member, member.epoch, why)

    def _ask_for_masks(self, worker: int) -> None:
        self.send(worker, PrepareMasks(self._members[worker].epoch))

    def _prepared(self, member: _Member, why: str | None) -> None:
        with self._changed:
            self._masks.answered(member.index, why)
        if member.stage is Stage.LOADING:  # it could have served but for these
            if why is None:
                self._serves(member)
            else:
                self._end(member, member.epoch, f"it could not compile what structured outputs need: {why}")

    def _serves(self, member: _Member) -> None:
        with self._changed:
            if self._masks.lacks(member.index):
                return
            member.stage, member.tries, member.why = Stage.SERVING, 0, None
            self._changed.notify_all()
            if self._listener is not None:  # within the lock, so that no loss comes before it
                self._listener.joined(member.index, member.epoch)

    def _ended(self, worker: int, epoch: int, why: str) -> None:
        """Take in that a worker has died."""
        self._end(self._members[worker], epoch, why)

    def _end(self, member: _Member, epoch: int, why: str) -> None:
        with self._changed:
            if member.epoch != epoch or member.stage in (Stage.DOWN, Stage.GIVEN_UP) or self._is_closed:
                return
            self._lose(member, why)

    def _lose(self, member: _Member, why: str) -> None:
        """Kill what is left of a worker, and have it started again later unless that has come to nothing too often."""
        handle, member.handle = member.handle, None
        had_served = member.stage is Stage.SERVING
        member.stage, member.why = Stage.DOWN, why
        member.tries += not had_served
        member.losses += 1
        pause = min(FIRST_PAUSE * 2 ** (member.losses - 1), _LONGEST_PAUSE)
        member.due = self._clock() + pause
        if handle is not None:
            handle.kill()
        if member.tries >= MOST_TRIES:
            member.stage = Stage.GIVEN_UP
        self._changed.notify_all()
        listener = self._listener
        if listener is not None and had_served:
            listener.lost(member.index, why)
        if listener is not None and member.stage is Stage.GIVEN_UP:
            listener.given_up(member.index, why)

    # ---- the keeper's thread

    def _keep(self) -> None:
        """Send beats, miss answers, and start what was lost again."""
        interval = self._timeout / _BEATS
        looked = self._clock()
        while True:
            with self._changed:
                if self._is_closed:
                    return
                self._changed.wait(min([interval, *self._until_due()]))
                if self._is_closed:
                    return
                now = self._clock()
                # A driver that was stopped itself has heard nobody: all get their time once more.
                slept, looked = now - looked > self._timeout / 2, now
                for member in self._members:
                    self._look(member, now, was_asleep=slept)

    def _until_due(self) -> list[float]:
        if self._listener is None:
            return []
        return [max(0.0, m.due - self._clock()) for m in self._members if m.stage is Stage.DOWN]

    def _look(self, member: _Member, now: float, *, was_asleep: bool) -> None:
        if member.stage is Stage.GIVEN_UP:
            return
        if member.stage is Stage.DOWN:
            if self._listener is not None and now >= member.due:
                self._start(member)
            return
        if was_asleep and member.heard is not None:
            member.heard = now
        silent = now - (member.begun if member.heard is None else member.heard)
        most = self._timeout if member.stage is Stage.SERVING else max(_START_SECONDS, self._timeout)
        if silent > most:
            self._lose(member, f"{self.backend.name(member.index)} was silent for {silent:.1f} s.")
            return
        if member.stage is Stage.SERVING and now - member.begun > _LONG_AGO:
            member.losses = 0
        self.send(member.index, Beat(member.epoch, next(self._numbers)))
