"""KV on its way between meshes of workers, as the driver knows it: what was begun, offered, fetched, and has arrived.

Within a worker the worker does it all, and only where a transfer goes is known here. Between workers the driver passes
the source's offer on to the destination, and has the source let go of it when it has been fetched, or nobody will. Not
thread-safe: `remote_executor.py` holds its lock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...protocol.actions import DropTransfer, StartTransfer
from ...protocol.offers import KVOffer
from ...protocol.worker import Fetch, Turn, Withdraw
from .crew import Crew
from .crew_member import Stage


@dataclass(eq=False)
class OnItsWay:
    """One transfer, until it is scattered or over."""

    source: int
    destination: int
    bucket: int
    begun: float  # on the driver's clock
    offer: KVOffer | None = None  # of one between workers, once it was fetched
    has_arrived: bool = False
    is_dropped: bool = False


class Transfers:
    """All transfers of one engine that are not over."""

    def __init__(self, crew: Crew, worker_of: Mapping[int, int], epochs: Sequence[int]) -> None:
        """Begin without any; `worker_of` says whose mesh is whose, `epochs` each worker's epoch at any time."""
        self._crew, self._worker_of, self._epochs = crew, worker_of, epochs
        self._all: dict[int, OnItsWay] = {}

    def __len__(self) -> int:
        return len(self._all)

    def begin(self, action: StartTransfer, now: float) -> None:
        """Take in a transfer whose source is told to begin."""
        self._all[action.transfer] = OnItsWay(action.source, action.destination, action.bucket, now)

    def offered(self, worker: int, number: int, offer: KVOffer) -> str | None:
        """Have the destination fetch what a source offers; return why it will not be."""
        one = self._all.get(number)
        if one is None or self._worker_of[one.source] != worker:
            self._withdraw(worker, number)
            return None
        one.offer, destination = offer, self._worker_of[one.destination]
        if one.is_dropped or self._crew.stage(destination) is not Stage.SERVING:
            self._withdraw(worker, number)
            del self._all[number]
            return "nobody needs it any more."
        epoch = self._epochs[destination]
        self._crew.send(destination, Fetch(epoch, number, one.source, one.destination, one.bucket, offer))
        return None

    def ended(self, number: int, *, has_arrived: bool) -> OnItsWay | None:
        """Take in that a transfer is there, or will not come; return it, or None where it was over already."""
        one = self._all.get(number)
        if one is None:
            return None
        if one.offer is not None:
            self._withdraw(self._worker_of[one.source], number, was_fetched=has_arrived)
        one.has_arrived = has_arrived
        if one.is_dropped or not has_arrived:
            del self._all[number]
        return one

    def scattered(self, number: int) -> None:
        """Take in that what has arrived is being used."""
        self._all.pop(number, None)

    def drop(self, number: int) -> int | None:
        """Take in that nobody needs a transfer; return the worker that has to know; None: nobody."""
        one = self._all.get(number)
        if one is None:
            return None
        source, destination = self._worker_of[one.source], self._worker_of[one.destination]
        if one.has_arrived:
            del self._all[number]
            return destination
        one.is_dropped = True
        return destination if source == destination or one.offer is not None else None

    def lost(self, worker: int) -> list[int]:
        """Take in that a worker is gone; return the transfers to it that failed for that. Those from it are known to
        have failed, with their meshes."""
        failed = []
        for number, one in list(self._all.items()):
            source, destination = self._worker_of[one.source], self._worker_of[one.destination]
            if source == worker and not one.has_arrived:
                if destination != worker and one.offer is not None:
                    self._crew.send(destination, Turn(self._epochs[destination], (DropTransfer(number),)))
                del self._all[number]
            elif destination == worker and one.has_arrived:
                del self._all[number]
            elif destination == worker and one.offer is not None:
                self._withdraw(source, number)
                del self._all[number]
                failed.append(number)
            elif destination == worker:
                one.is_dropped = True  # it fails when it is offered
        return failed

    def _withdraw(self, worker: int, number: int, *, was_fetched: bool = False) -> None:
        self._crew.send(worker, Withdraw(self._epochs[worker], number, was_fetched))
