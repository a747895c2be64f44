"""An engine in virtual time: the real scheduler, and meshes that take as long as a few numbers say.

A step takes a fixed time and so much more for each prompt token and each row that decodes. A mesh runs one step after
the other. A transfer begins when its gather's turn on the source has come and takes so much for each page; the link is
never full. Every request runs to its full length. Here is no clock, no randomness, no model and no device.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill, StartTransfer
from twinmesh.engine.protocol.events import Arrived, Event, Outcome, StepDone, Tick, TransferReady
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.scheduler.scheduler import Scheduler

type Step = Prefill | Decode | Fused


@dataclass(frozen=True)
class StepTime:
    """How long steps and transfers take, in seconds.

    The defaults stand for a model of 8 billion parameters on one H100: 5 ms to read the weights, 20,000 prompt tokens
    per second, 0.02 ms for a row's attention.
    """

    step: float = 0.005  # of every step
    token: float = 0.00005  # more for each prompt token
    row: float = 0.00002  # more for each row that decodes
    chunk: int = 512  # tokens of a full prefill step, as engines have by default
    page: float = 0.0  # of each page that a transfer carries

    def seconds(self, action: Step) -> float:
        """Return the seconds that one dispatched action takes."""
        if isinstance(action, Decode):
            return action.steps * (self.step + self.row * len(action.rows))
        rows = len(action.rows) if isinstance(action, Fused) else 0
        return self.step + self.token * sum(chunk.length for chunk in action.chunks) + self.row * rows

    def transfer(self, action: StartTransfer) -> float:
        """Return the seconds that a transfer takes."""
        return self.page * sum(map(len, action.source_pages))


class VirtualEngine:
    """A run: events in the order of their times, and meshes that do one step at a time each."""

    def __init__(
        self, scheduler: Scheduler, times: StepTime, observe: Callable[[float, float, Step], None] | None = None
    ):
        """Begin idle; `observe` is told the begin and end of every step as it is dispatched."""
        self._scheduler, self._times, self._observe = scheduler, times, observe
        self._free = [0.0] * len(scheduler.meshes)  # when each mesh has done all that was dispatched
        self._events: list[tuple[float, int, Event | Step]] = []
        self._entries = count()
        self.requests: list[Request] = []  # all that have arrived, in order of arrival

    def post(self, event: Event) -> None:
        """Let something happen at its time."""
        self._push(event.t, event)

    def run(self) -> list[Request]:
        """Run until nothing is left to happen; return all requests, in order of arrival."""
        while self._events or self._scheduler.next_due() is not None:
            t, event = self._next()
            self._scheduler.on(event)
            if isinstance(event, Arrived):
                self.requests.append(self._scheduler.requests[event.facts.id])
            for action in self._scheduler.actions():
                if isinstance(action, Prefill | Decode | Fused):
                    self._dispatch(t, action)
                elif isinstance(action, StartTransfer):
                    # The gather is in the source's order.
                    at = max(t, self._free[action.source]) + self._times.transfer(action)
                    self._push(at, TransferReady(at, action.transfer))
        return self.requests

    def _push(self, t: float, event: Event | Step) -> None:
        """Add something that happens at a time; a step stands for its result."""
        heapq.heappush(self._events, (t, next(self._entries), event))

    def _next(self) -> tuple[float, Event]:
        """Take what happens next: an event, a step's end, or that something is due before either."""
        due = self._scheduler.next_due()
        if due is not None and (not self._events or due < self._events[0][0]):
            return due, Tick(due)
        t, _, event = heapq.heappop(self._events)
        return t, self._outcome(t, event) if isinstance(event, Prefill | Decode | Fused) else event

    def _dispatch(self, t: float, action: Step) -> None:
        begin = max(t, self._free[action.mesh])
        self._free[action.mesh] = end = begin + self._times.seconds(action)
        if self._observe is not None:
            self._observe(begin, end, action)
        self._push(end, action)

    def _outcome(self, t: float, step: Step) -> StepDone:
        outcomes: list[Outcome] = []
        for row, tokens in sampling_rows(step):
            request = self._scheduler.owner(row)
            if request is not None:
                left = request.max_tokens - request.confirmed
                outcomes += [Outcome(row.request_id, False)] * min(tokens, left)
        return StepDone(t, step.mesh, step.step, tuple(outcomes))


def sampling_rows(step: Step) -> Iterator[tuple[Chunk | DecodeRow, int]]:
    """Yield the rows that sample, and how many tokens each samples."""
    if not isinstance(step, Decode):
        yield from ((chunk, 1) for chunk in step.chunks if chunk.is_last)
    if not isinstance(step, Prefill):
        yield from ((row, step.steps if isinstance(step, Decode) else 1) for row in step.rows)


def prompt_tokens(step: Step) -> int:
    """Count the prompt tokens that a step computes."""
    chunks: Sequence[Chunk] = () if isinstance(step, Decode) else step.chunks
    return sum(chunk.length for chunk in chunks)
