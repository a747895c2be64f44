"""The contract of workers: other processes that own meshes, as the driver sees them and as they see the driver.

The driver's half of an engine (scheduler, core, loop) knows a worker as a `WorkerHandle`, which a `WorkerBackend`
starts: stdlib processes (`worker/remote/processes.py`), or actors of a cluster. The worker's half knows the driver as a
`DriverEnd`. All that crosses are the messages below, as bytes (`wire.py`), in both directions in order. Nothing here
knows the scheduler, and a backend reads no message: it carries bytes and says when a worker has died.

A worker serves one epoch, a number that no other start of any worker has. Every message names it, and whatever comes
of another epoch is refused. What runs in a worker, whatever its backend, is `startup/worker_main.serve(driver)`.

A KV transfer between meshes of two workers: the source performs `StartTransfer`, gathers, offers the pages through a
link and answers `Offered`; the driver passes the offer on as `Fetch`; the destination fetches on a thread of its
own and posts `TransferReady` or `TransferFailed`. Then, or where nobody needs it, `Withdraw` lets the source go.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from .actions import Command
from .events import TransferFailed, TransferReady
from .message import Message
from .offers import KVOffer
from .results import Completion

UNTOLD = 0  # the epoch of a worker that could not read which it is

# ---- the contract


class Place(msgspec.Struct, frozen=True):
    """Where a worker stands: the meshes that it owns, and those that share the memory of its machine with them."""

    meshes: tuple[int, ...]  # by their number in the topology
    on_machine: tuple[int, ...]  # its own and those of other workers there


class Member(msgspec.Struct, frozen=True):
    """The place of a process among those that have a mesh between them, its group."""

    index: int  # from 0, which has the group's coordinator
    count: int  # of all members
    coordinator: str  # host:port, at which the first member waits for the others


class WorkerHandle(Protocol):
    """One start of one worker, from `WorkerBackend.start` to its death."""

    def send(self, data: bytes) -> None:
        """Send bytes, in order, without waiting for anything; what is sent to a worker that is dead is lost."""
        ...

    def kill(self) -> None:
        """End the worker at once, also one that does not answer; calling it again does nothing.

        Whatever it still sends is not delivered any more, as far as the backend can tell.
        """
        ...


class WorkerBackend(Protocol):
    """What starts workers, again and again: processes of this machine, or actors of a cluster."""

    @property
    def places(self) -> Sequence[Place]:
        """Return where each worker stands; their meshes are those of the topology, each once."""
        ...

    def name(self, worker: int) -> str:
        """Name a worker in messages to people, such as "worker 1 (process 4711)"."""
        ...

    def start(
        self, worker: int, epoch: int, received: Callable[[bytes], None], ended: Callable[[str], None]
    ) -> WorkerHandle:
        """Start a worker, which then runs `serve` and waits for `Prepare`; the one before must have ended.

        Args:
            worker: which, an index of `places`.
            epoch: the number of this start, for `received` of late messages to be told apart.
            received: takes what the worker sends, message by message and in order, on a thread of the backend's.
            ended: is called once, after the last `received`, with why, when the worker has died or was killed.

        Raises:
            ValueError: it cannot be started; says why and what to do.
        """
        ...

    def close(self) -> None:
        """End all workers that still live, wait for their end, and let go of what they stood on."""
        ...


class DriverEnd(Protocol):
    """What a worker has of its driver."""

    @property
    def host(self) -> str | None:
        """Return this machine's address as workers of other machines reach it; None: all are on this one."""
        ...

    def receive(self) -> bytes | None:
        """Wait for the next message; None: the driver has ended, or wants this worker to end."""
        ...

    def send(self, data: bytes) -> None:
        """Send bytes, from any thread, in order; where the driver is gone they are lost."""
        ...


# ---- from the driver to a worker


class Prepare(Message, frozen=True):
    """Check all that can be checked before anything loads, and answer `Checked` or `Refused`."""

    epoch: int
    worker: int
    place: Place
    asked: bytes  # what for: `startup/worker_part.py`'s
    member: Member | None = None  # of a group that has the mesh between them; None: it has its meshes alone


class Load(Message, frozen=True):
    """Load and compile as was agreed with all workers; answer `Serving` or `Refused`."""

    epoch: int
    agreed: bytes  # `startup/worker_part.py`'s


class Turn(Message, frozen=True):
    """Perform these commands, in order: all of one turn of the driver's loop that are for this worker."""

    epoch: int
    commands: tuple[Command, ...]


class Fetch(Message, frozen=True):
    """Fetch what another worker offers for a mesh here; answer with the completion of the transfer."""

    epoch: int
    transfer: int
    source: int  # mesh
    destination: int  # mesh, of this worker
    bucket: int  # pages
    offer: KVOffer


class Withdraw(Message, frozen=True):
    """Let go of what was gathered for a transfer: it was fetched, or will not be."""

    epoch: int
    transfer: int
    was_fetched: bool


class NewParams(Message, frozen=True, eq=False):
    """Use other parameters from here on. They are checked. `Alive` answers at once, with the number 0."""

    epoch: int
    params: dict[str, "HostArray"]  # by name


class PrepareMasks(Message, frozen=True):
    """Compile what masks over tokens need, on a thread of its own while steps go on; answer `MasksPrepared`.

    It is sent before the first `AllowTokens`, which waits for the answer.
    """

    epoch: int


class Beat(Message, frozen=True):
    """Answer with the same number at once, whatever else there is to do."""

    epoch: int
    number: int


class HostArray(msgspec.Struct, frozen=True):
    """An array of any dtype as bytes, in C order."""

    dtype: str  # its name, such as "bfloat16"
    shape: tuple[int, ...]
    data: bytes


ToWorker = Prepare | Load | Turn | Fetch | Withdraw | NewParams | PrepareMasks | Beat

# ---- from a worker to the driver


class Checked(Message, frozen=True):
    """All is there; nothing is loaded yet."""

    epoch: int
    found: bytes  # `startup/worker_part.py`'s


class Refused(Message, frozen=True):
    """The worker cannot serve, or go on to; it ends after this."""

    epoch: int  # `UNTOLD`: it does not know it
    why: str  # a sentence


class Serving(Message, frozen=True):
    """Everything is loaded and compiled; KV pools are empty."""

    epoch: int


class MasksPrepared(Message, frozen=True):
    """What masks over tokens need is there, or could not be made; the worker goes on either way."""

    epoch: int
    why: str | None = None  # a sentence: why not


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """A transfer that has arrived, for `Traffic`."""

    source: int
    destination: int
    size: int  # bytes
    seconds: float


class Posted(Message, frozen=True, eq=False):
    """Completions, in order. Their times, and `sent`, are on the worker's clock, which may not be the driver's."""

    epoch: int
    sent: float
    completions: tuple[Completion, ...]
    moved: tuple[Moved, ...] = ()


class Offered(Message, frozen=True):
    """The pages of a transfer are gathered and can be fetched."""

    epoch: int
    transfer: int
    offer: KVOffer


class Transferred(Message, frozen=True):
    """A transfer has ended in one of the processes that have a mesh between them; in place of `Posted`."""

    epoch: int
    sent: float  # on the worker's clock
    completion: TransferReady | TransferFailed


class Alive(Message, frozen=True):
    """Answer a `Beat`, or `NewParams`, which may keep beats behind them waiting."""

    epoch: int
    number: int
    compiled: int = 0  # how often something was compiled after start-up


FromWorker = Checked | Refused | Serving | MasksPrepared | Posted | Offered | Transferred | Alive
