"""What a worker sends to its driver: completions of several threads, as many at once as there are.

Whoever posts sends, with all that was posted meanwhile, unless another thread is at it; so nothing waits for a thread
to wake up, and a driver that is slow to read gets fewer and larger messages.
"""

import threading
from collections import deque
from collections.abc import Callable

from ...protocol import wire
from ...protocol.events import TransferFailed, TransferReady
from ...protocol.offers import KVOffer
from ...protocol.results import Completion, MeshLost, StepFailed, Traffic
from ...protocol.worker import FromWorker, Member, Moved, Offered, Posted, Refused, Transferred


class Outbox(Traffic):
    """The way of one worker's messages to its driver; as the traffic of an executor it reports what has moved."""

    def __init__(self, epoch: int, send: Callable[[bytes], None], clock: Callable[[], float]) -> None:
        """Send nothing yet; `clock` gives seconds."""
        super().__init__()
        self._epoch, self._send, self._clock = epoch, send, clock
        self._lock = threading.Lock()
        self._posted = deque[Completion]()
        self._moved = deque[Moved]()

    def post(self, completion: Completion) -> None:
        """Send a completion, from any thread; those of one thread arrive in order."""
        self._posted.append(completion)
        self._drain()

    def say(self, message: FromWorker) -> None:
        """Send any other message, from any thread."""
        data = wire.encode(message)
        with self._lock:
            self._send(data)
        self._drain()

    def offered(self, transfer: int, offer: KVOffer) -> None:
        """Say that a transfer can be fetched."""
        self.say(Offered(self._epoch, transfer, offer))

    def count(self, source: int, destination: int, size: int, seconds: float) -> None:
        """Report a transfer that has arrived, with the completion that is posted next."""
        self._moved.append(Moved(source, destination, size, seconds))

    def _drain(self) -> None:
        while self._posted and self._lock.acquire(blocking=False):
            try:
                posted, moved = _all(self._posted), _all(self._moved)
                if posted:
                    self._send(wire.encode(Posted(self._epoch, self._clock(), posted, moved)))
            finally:
                self._lock.release()  # and look again: others may have posted while they could not send


class MemberOutbox(Outbox):
    """That of one of the processes that have a mesh between them.

    All have the same results, which the first one posts. How a transfer ends each says for itself. After a step that
    has failed in one of them nobody knows how far the others came: it refuses to go on, and all are lost.
    """

    def __init__(self, epoch: int, send: Callable[[bytes], None], clock: Callable[[], float], member: Member) -> None:
        """Send nothing yet."""
        super().__init__(epoch, send, clock)
        self._member = member

    def post(self, completion: Completion) -> None:
        """Send a completion, where it is this process's to send."""
        match completion:
            case StepFailed(reason=reason) | MeshLost(reason=reason):
                place = f"process {self._member.index} of the {self._member.count} of mesh {completion.mesh}"
                self.say(Refused(self._epoch, f"{place} failed: {reason}"))
            case TransferReady() | TransferFailed():
                self.say(Transferred(self._epoch, self._clock(), completion))
            case _ if self._member.index == 0:
                super().post(completion)


def _all[T](queue: deque[T]) -> tuple[T, ...]:
    return tuple(queue.popleft() for _ in range(len(queue)))
