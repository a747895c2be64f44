"""The workers of one engine, as its driver keeps them: started, listened to, missed, ended and started again.

A worker counts as lost when its backend says so, when it refuses to go on, when what it sends cannot be read, or when
nothing was heard of it for longer than `worker_timeout` on the driver's clock, or minutes while it starts, whatever
else believes it alive: it is killed then, so that it cannot come back by itself. Beats go out from a thread that does
nothing else, and a worker answers them on a thread that computes nothing. What was lost is started again after a while,
loads what was agreed when the engine started, and serves under an epoch of its own; whatever an earlier epoch still
sends is refused.

Invariant: for each epoch that has served, `lost` is called once before another serves. It knows no scheduler and no
mesh: `remote_executor.py` does.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ...host.threads import EngineThread
from ...protocol import wire
from ...protocol.worker import (
    UNTOLD,
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
)
from .crew_member import CrewMember, Stage
from .mask_programs import MaskPrograms

_BEATS = 5  # in a `worker_timeout`


class Listener(Protocol):
    """Who hears of workers that have served, on any thread, one at a time for each worker."""

    def heard(self, worker: int, message: FromWorker) -> None:
        """Take a message that is not the crew's own."""
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


class Crew:
    """All workers of one engine."""

    def __init__(
        self, backend: WorkerBackend, asked: Sequence[bytes], clock: Callable[[], float], timeout: float
    ) -> None:
        """Start nobody yet; `asked` is what each worker is to check, `timeout` is in seconds."""
        self.backend, self._asked, self._clock, self._timeout = backend, asked, clock, timeout
        self._members = [CrewMember(index, place) for index, place in enumerate(backend.places)]
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
            for member in self._members:
                if member.stage is not Stage.SERVING:  # lost since it was loaded
                    listener.lost(member.index, member.why or "it has ended.")

    def _wait_for(self, stage: Stage) -> None:
        with self._changed:
            while any(member.stage is not stage for member in self._members):
                failed = next((m for m in self._members if m.stage in (Stage.DOWN, Stage.GIVEN_UP)), None)
                if failed is not None:
                    raise ValueError(f"{self.backend.name(failed.index)} cannot serve: {failed.why}")
                self._changed.wait()

    # ---- while it runs

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

    def give_up_on(self, worker: int, epoch: int, why: str) -> None:
        """End a worker that has sent what cannot be, and start it again: nobody knows what else it would have said, of
        transfers from and to others too."""
        self._end(self._members[worker], epoch, why)

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

    def _start(self, member: CrewMember) -> None:
        index, epoch = member.index, next(self._epochs)
        member.begin(epoch, self._clock())
        self._masks.forget(index)
        received, ended = partial(self._received, index, epoch), partial(self._ended, index, epoch)
        try:
            member.handle = self.backend.start(index, epoch, received, ended)
        except ValueError as error:
            self._lose(member, str(error))
            return
        self.send(index, Prepare(epoch, index, member.place, self._asked[index]))

    def _load(self, member: CrewMember) -> None:
        assert self._agreed is not None
        if member.stage is Stage.CHECKED:
            member.stage = Stage.LOADING
            self.send(member.index, Load(member.epoch, self._agreed))

    def _received(self, worker: int, epoch: int, data: bytes) -> None:
        """Take in what a worker has sent, on a thread of the backend's."""
        member = self._members[worker]
        if member.epoch != epoch or not member.is_there:
            return
        member.heard = self._clock()
        try:
            message = wire.decode_from_worker(data)
        except wire.WireError as error:
            self.give_up_on(worker, epoch, f"what it sent could not be read: {error}")
            return
        if message.epoch == epoch or (message.epoch == UNTOLD and isinstance(message, Refused)):
            self._take(member, epoch, message)

    def _take(self, member: CrewMember, epoch: int, message: FromWorker) -> None:
        match message:
            case Alive(compiled=compiled):
                member.compiled = compiled
            case Checked(found=found):
                self._checked(member, epoch, found)
            case Serving():
                self._serves(member, epoch)
            case MasksPrepared(why=why):
                self._prepared(member, epoch, why)
            case Refused(why=why):
                self._end(member, epoch, why)
            case _ if self._listener is not None:
                self._listener.heard(member.index, message)

    def _checked(self, member: CrewMember, epoch: int, found: bytes) -> None:
        with self._changed:
            if not self._is_at(member, epoch, Stage.CHECKING):
                return
            member.found, member.stage = found, Stage.CHECKED
            self._changed.notify_all()
            if self._agreed is None:  # the engine starts, and waits for all
                return
            why = self._may_join(member.index, found)
            if why is None:
                self._load(member)
            else:
                self._lose(member, why)

    def _ask_for_masks(self, worker: int) -> None:
        self.send(worker, PrepareMasks(self._members[worker].epoch))

    def _prepared(self, member: CrewMember, epoch: int, why: str | None) -> None:
        with self._changed:
            if member.epoch != epoch or not member.is_there:
                return
            self._masks.answered(member.index, why)
            if member.stage is Stage.SERVING:
                return
            if why is None:  # it could have served but for these
                self._serves(member, epoch)
            else:
                self._lose(member, f"it could not compile what structured outputs need: {why}")

    def _serves(self, member: CrewMember, epoch: int) -> None:
        with self._changed:
            if not self._is_at(member, epoch, Stage.LOADING) or self._masks.lacks(member.index):
                return
            member.serve()
            self._changed.notify_all()
            if self._listener is not None:  # within the lock, so that no loss comes before it
                self._listener.joined(member.index, member.epoch)

    def _is_at(self, member: CrewMember, epoch: int, stage: Stage) -> bool:
        """Return whether a worker is where it must be to say what it says: it may have been lost a moment before."""
        return member.epoch == epoch and member.stage is stage and not self._is_closed

    def _ended(self, worker: int, epoch: int, why: str) -> None:
        """Take in that a worker has died."""
        self._end(self._members[worker], epoch, why)

    def _end(self, member: CrewMember, epoch: int, why: str) -> None:
        with self._changed:
            if member.epoch == epoch and member.is_there and not self._is_closed:
                self._lose(member, why)

    def _lose(self, member: CrewMember, why: str) -> None:
        """Kill what is left of a worker, and have it started again later unless that has come to nothing too often."""
        had_served = member.stage is Stage.SERVING
        handle = member.lose(why, self._clock())
        if handle is not None:
            handle.kill()
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

    def _look(self, member: CrewMember, now: float, *, was_asleep: bool) -> None:
        if member.stage is Stage.GIVEN_UP:
            return
        if member.stage is Stage.DOWN:
            if self._listener is not None and now >= member.due:
                self._start(member)
            return
        if was_asleep and member.heard is not None:
            member.heard = now
        silent = member.silence(now)
        if silent > member.may_be_silent(self._timeout):
            self._lose(member, f"{self.backend.name(member.index)} was silent for {silent:.1f} s.")
            return
        member.forgive(now)
        self.send(member.index, Beat(member.epoch, next(self._numbers)))
