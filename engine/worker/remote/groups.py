"""Workers that are one to the driver and several to their backend: the processes over which one mesh is divided.

What the driver sends goes to every member of a group, in the same order, so that all run the same programs; what they
have found, that they serve and that they are alive goes to the driver when it holds for all of them, and results are
the first member's, which alone posts them (`outbox.py`). Invariant: members have one fate. Where one ends, refuses
or is silent the whole group is lost, and all of it is started again together, to meet at an address of its own. Other
workers know nothing of it.

Carries bytes and reads only what it has to join; knows no backend, no JAX and no mesh.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from ...protocol import wire
from ...protocol.actions import DropTransfer
from ...protocol.events import TransferFailed, TransferReady
from ...protocol.offers import joined
from ...protocol.worker import (
    Alive,
    Checked,
    FromWorker,
    MasksPrepared,
    Member,
    Offered,
    Place,
    Posted,
    Prepare,
    Refused,
    Serving,
    Transferred,
    Turn,
    Withdraw,
    WorkerBackend,
    WorkerHandle,
)

type Received = Callable[[bytes], None]
type Ended = Callable[[str], None]


class Groups:
    """Groups of a backend's workers, each of them one worker; a `WorkerBackend` (`protocol/worker.py`)."""

    def __init__(
        self,
        backend: WorkerBackend,
        size: int,
        coordinator: Callable[[int], str],
        merge: Callable[[Sequence[bytes]], bytes],
    ) -> None:
        """Join each `size` neighbouring workers of `backend`, which have the same place.

        Args:
            backend: what starts the members.
            size: members of each group.
            coordinator: gives the address, host:port, at which the members of a group meet whose first is this worker
                of `backend`; another one at every call.
            merge: makes of what all members have found when they checked what the driver is told; raises ValueError
                where they cannot serve together.
        """
        self.backend, self._size, self._coordinator, self._merge = backend, size, coordinator, merge

    @property
    def places(self) -> Sequence[Place]:
        """Return where each group stands: where its first member does."""
        return self.backend.places[:: self._size]

    def name(self, worker: int) -> str:
        """Name a group by its members."""
        return " and ".join(self.backend.name(member) for member in self._members(worker))

    def start(self, worker: int, epoch: int, received: Received, ended: Ended) -> WorkerHandle:
        """Start all members of a group; raises as the backend does, and then none is left."""
        members = self._members(worker)
        group = _Group(epoch, self._coordinator(members[0]), self._size, self._merge, received, ended)
        for rank, member in enumerate(members):
            try:
                group.add(self.backend.start(member, epoch, group.receiver(rank), group.ender(self.backend, member)))
            except ValueError:
                group.kill()
                raise
        return group

    def close(self) -> None:
        """End all members, and wait for their end."""
        self.backend.close()

    def _members(self, worker: int) -> range:
        return range(worker * self._size, (worker + 1) * self._size)


class _Group:
    """One start of one group; a `WorkerHandle`."""

    def __init__(
        self,
        epoch: int,
        coordinator: str,
        size: int,
        merge: Callable[[Sequence[bytes]], bytes],
        received: Received,
        ended: Ended,
    ) -> None:
        self._epoch, self._coordinator, self._size, self._merge = epoch, coordinator, size, merge
        self._received, self._on_end = received, ended
        self._handles: list[WorkerHandle] = []
        # Held while the driver takes something in, so that it takes one thing after the other. `send` and `kill` do
        # without: the driver calls them with locks of its own, which it takes to take something in.
        self._lock = threading.Lock()
        self._found: dict[int, bytes] = {}  # by member
        self._serving: set[int] = set()
        self._masks: dict[int, str | None] = {}  # by member: why it could not prepare them, if so
        self._alive: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by number: each member's compilations
        self._transfers: defaultdict[int, dict[int, Offered | Transferred]] = defaultdict(dict)  # by number, and member
        self._left = size  # members whose end was not seen
        self._why: str | None = None  # why the first one ended

    def add(self, handle: WorkerHandle) -> None:
        """Take the next member in; one that was added after another has ended is ended as well."""
        self._handles.append(handle)
        if self._why is not None:
            handle.kill()

    def receiver(self, rank: int) -> Received:
        """Return what takes the messages of a member."""

        def received(data: bytes) -> None:
            with self._lock:
                self._take(rank, data)

        return received

    def ender(self, backend: WorkerBackend, member: int) -> Ended:
        """Return what takes in that a member has ended."""

        def ended(why: str) -> None:
            with self._lock:
                if self._why is None:
                    self._why = f"{backend.name(member)}, one of {self._size} with this mesh: {why}"
                self._left -= 1
                self.kill()
                if not self._left:
                    self._on_end(self._why)

        return ended

    def send(self, data: bytes) -> None:
        """Send to every member; each learns its own place when it is to prepare, which comes first."""
        handles = list(self._handles)
        if wire.kind_of(data) != Prepare.__name__:
            for handle in handles:
                handle.send(data)
            return
        message = wire.decode_to_worker(data)
        assert isinstance(message, Prepare)
        for rank, handle in enumerate(handles):
            member = Member(rank, self._size, self._coordinator)
            handle.send(wire.encode(replace(message, member=member)))

    def kill(self) -> None:
        """End every member."""
        for handle in list(self._handles):
            handle.kill()

    # ---- what members send

    def _take(self, rank: int, data: bytes) -> None:
        """Pass on what is the first member's alone, and join what all have to say."""
        kind = wire.kind_of(data)
        if kind not in _JOINED:
            if rank == 0 or kind == Refused.__name__ or kind is None:
                self._received(data)
            return
        try:
            message = wire.decode_from_worker(data)
        except wire.WireError:
            self._received(data)  # the driver says so
            return
        if message.epoch == self._epoch and (joined := self._join(rank, message)) is not None:
            self._received(wire.encode(joined))

    def _join(self, rank: int, message: FromWorker) -> FromWorker | None:
        """Return what the group says, if this was the last member to say it."""
        match message:
            case Checked(found=found):
                self._found[rank] = found
                if len(self._found) == self._size:
                    return self._checked()
            case Serving():
                self._serving.add(rank)
                if len(self._serving) == self._size:
                    return message
            case MasksPrepared(why=why):
                self._masks[rank] = why
                if len(self._masks) == self._size:
                    whys = [self._masks[member] for member in range(self._size)]
                    self._masks.clear()
                    return replace(message, why=next(filter(None, whys), None))
            case Alive(number=number, compiled=compiled):
                said = self._alive[number]
                said[rank] = compiled
                if len(said) == self._size:
                    self._alive = defaultdict(dict, {n: x for n, x in self._alive.items() if n > number})
                    return replace(message, compiled=max(said.values()))
            case Offered(transfer=number) | Transferred(completion=TransferReady(transfer=number)):
                return self._transferred(number, rank, message)
            case Transferred(completion=TransferFailed(transfer=number)):
                return self._transferred(number, rank, message)
        return None

    def _transferred(self, number: int, rank: int, message: Offered | Transferred) -> FromWorker | None:
        """Return what becomes of a transfer, once all members have offered, fetched or failed to; parts of one that has
        failed somewhere are let go of everywhere."""
        said = self._transfers[number]
        said[rank] = message
        if len(said) < self._size:
            return None
        del self._transfers[number]
        in_order = [said[member] for member in range(self._size)]
        offers = [one.offer for one in in_order if isinstance(one, Offered)]
        if len(offers) == self._size:
            return Offered(self._epoch, number, joined(offers))
        ends = [one for one in in_order if isinstance(one, Transferred)]
        failed = [one for one in ends if isinstance(one.completion, TransferFailed)]
        if failed:
            self.send(wire.encode(Withdraw(self._epoch, number, was_fetched=False)))
            self.send(wire.encode(Turn(self._epoch, (DropTransfer(number),))))
        last = (failed or ends)[0]
        return Posted(self._epoch, last.sent, (last.completion,))

    def _checked(self) -> FromWorker:
        try:
            return Checked(self._epoch, self._merge([self._found[rank] for rank in range(self._size)]))
        except ValueError as error:
            return Refused(self._epoch, str(error))


_JOINED = frozenset(kind.__name__ for kind in (Checked, Serving, MasksPrepared, Alive, Offered, Transferred))
