"""Links between meshes in virtual time: transfers that are under way at once share what a mesh sends and takes in.

A transfer takes a fixed time and then its bytes, at the link's rate divided by the number of transfers that send bytes
from its source or to its destination, whichever are more, exactly as those come and go (processor sharing). Links of
other meshes do not slow it down. What leaves one source is reported in the order in which it left, as the real executor
does, whose one thread waits for the transfers of a source. No clock of its own and no randomness.
"""

from collections import deque
from collections.abc import Callable

from ..scheduler.cost_model import LinkCost
from .virtual_time import VirtualTime


class Sending:
    """A transfer on a link."""

    __slots__ = ("begun", "destination", "is_done", "left", "number", "rate", "since", "size", "source", "version")

    def __init__(self, number: int, source: int, destination: int, size: int, begun: float) -> None:
        self.number, self.source, self.destination, self.size, self.begun = number, source, destination, size, begun
        self.left, self.rate, self.since = float(size), 0.0, begun  # bytes, bytes a second, of when these are
        self.version = 0  # how often its end was planned
        self.is_done = False


class Links:
    """The links of one engine."""

    def __init__(self, time: VirtualTime, costs: LinkCost, meshes: int, arrived: Callable[[Sending], None]) -> None:
        """Begin with nothing on them; `arrived` is told of each transfer that has arrived."""
        self._time, self._costs, self._arrived = time, costs, arrived
        self._leaving: list[dict[Sending, None]] = [{} for _ in range(meshes)]  # that send bytes, by source
        self._coming: list[dict[Sending, None]] = [{} for _ in range(meshes)]  # and by destination
        self._order: list[deque[Sending]] = [deque() for _ in range(meshes)]  # by source, those not reported

    def send(self, number: int, source: int, destination: int, size: int) -> None:
        """Begin a transfer of `size` bytes now."""
        now = self._time.now
        sending = Sending(number, source, destination, size, now)
        self._order[source].append(sending)
        if self._costs.is_shared and self._costs.byte > 0 and size > 0:
            self._time.at(now + self._costs.fixed, self._enter, sending)
        else:
            self._time.at(now + self._costs.fixed + self._costs.byte * size, self._end, sending)

    def _enter(self, sending: Sending) -> None:
        """Begin with its bytes."""
        self._leaving[sending.source][sending] = self._coming[sending.destination][sending] = None
        self._share(sending.source, sending.destination)

    def _share(self, source: int, destination: int) -> None:
        """Divide the rate anew among all that the number of transfers at these two meshes may slow down."""
        now, byte = self._time.now, self._costs.byte
        for sending in self._leaving[source] | self._coming[destination]:
            shares = max(len(self._leaving[sending.source]), len(self._coming[sending.destination]))
            rate = 1.0 / (byte * shares)
            if rate != sending.rate:
                sending.left -= sending.rate * (now - sending.since)
                sending.rate, sending.since = rate, now
                sending.version += 1
                self._time.at(now + max(0.0, sending.left) / rate, self._run_out, (sending, sending.version))

    def _run_out(self, planned: tuple[Sending, int]) -> None:
        """End a transfer whose bytes are sent, unless they were slowed down or sped up since this was planned."""
        sending, version = planned
        if sending.version == version:
            del self._leaving[sending.source][sending], self._coming[sending.destination][sending]
            self._share(sending.source, sending.destination)
            self._end(sending)

    def _end(self, sending: Sending) -> None:
        """Report a transfer that has arrived, and those behind it that waited for it alone."""
        sending.is_done = True
        order = self._order[sending.source]
        while order and order[0].is_done:
            self._arrived(order.popleft())
