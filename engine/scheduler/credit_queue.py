"""The requests whose KV waits to be handed over, in the policy's order: those that ask for credit, those that hold it
and wait for staging, and those that sleep because their blocks are on their way already, for another request.

Invariants: each is one of the three; one that sleeps does so for a block that is on its way. It gives no credit and
sends nothing: `handoffs.py` does.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from ..paging.room import RoomChanges
from .mesh_state import sorted_requests
from .request import Request, State, Wait


class CreditQueue:
    """The queue of one engine."""

    def __init__(self, room: RoomChanges, arriving: Mapping[bytes, int]):
        """Begin empty; `room` says when meshes have room again, `arriving` which blocks are on their way."""
        self._arriving = arriving
        self._asking, self._credited = sorted_requests(), sorted_requests()
        self._asleep: dict[bytes, dict[Request, None]] = {}
        self._count = 0  # of all: most often there are none, and everything is asked after each step
        self.refusal = room.refusal()  # of the first that asked and got no credit; those behind it wait too

    def __bool__(self) -> bool:
        return self._count > 0

    def __iter__(self) -> Iterator[Request]:
        return chain(self._asking, self._credited, *self._asleep.values())

    def __len__(self) -> int:
        return self._count

    @property
    def longest_asking(self) -> Request | None:
        """Return the first in the order of those that ask for credit."""
        return self._asking[0] if self._asking else None

    def first(self) -> Request | None:
        """Find the first that holds credit or may ask for it: the one that got none, only when there may be room."""
        if not self._count:
            return None
        credited = self._credited[0] if self._credited else None
        asking = self._asking[0] if self._asking else None
        if asking is None or self.refusal.holds(asking):
            return credited
        return asking if credited is None or asking.order < credited.order else credited

    @property
    def first_refused(self) -> Request | None:
        """Return the first that asks, if it got no credit the last time."""
        asking = self._asking[0] if self._count and self._asking else None
        return asking if asking is not None and self.refusal.holds(asking) else None

    def add(self, request: Request) -> None:
        """Take a request in, with credit or without."""
        self._count += 1
        (self._asking if request.handoff is None else self._credited).add(request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self._count -= 1
        if request.wait is None:
            (self._asking if request.handoff is None else self._credited).remove(request)
        else:
            self._take_sleeper(request, request.wait)

    def grant(self, request: Request) -> None:
        """Note that a request that asked holds credit now."""
        self._asking.remove(request)
        self._credited.add(request)

    def withdraw(self, request: Request) -> None:
        """Note that a request that held credit has to ask again."""
        self._credited.remove(request)
        self._asking.add(request)

    def sleep(self, request: Request, block: bytes) -> None:
        """Let a request that asks sleep until this block is there or will not come."""
        self._asking.remove(request)
        request.wait = Wait(block)
        self._asleep.setdefault(block, {})[request] = None

    def wake(self, blocks: Iterable[bytes]) -> None:
        """Let those ask that sleep for one of these blocks."""
        for block in blocks if self._asleep else ():
            for request in self._asleep.pop(block, ()):
                request.wait = None
                self._asking.add(request)

    def _take_sleeper(self, request: Request, wait: Wait) -> None:
        assert isinstance(wait.key, bytes)
        request.wait = None
        sleepers = self._asleep[wait.key]
        del sleepers[request]
        if not sleepers:
            del self._asleep[wait.key]

    def check(self) -> None:
        """Raise unless all are here whom this queue is for, each where it belongs."""
        if self._count != len(list(self)):
            raise RuntimeError(f"{self._count} requests are counted as waiting for credit, not {len(list(self))}")
        for request in self:
            if request.state is not State.HANDOFF or request.placement is None:
                raise RuntimeError(f"request {request.id} is {request.state} and waits for credit")
            if request.sleeps_for is not None and request.sleeps_for not in self._arriving:
                raise RuntimeError(f"request {request.id} waits for a block that is not on its way")
        if any(request.handoff is not None for request in chain(self._asking, *self._asleep.values())):
            raise RuntimeError("a request that holds credit asks for it")
