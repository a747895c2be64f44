"""What the meshes of a running engine did and when, so that every gap between two tokens can be told from it.

`Watch` is an observer of the core: it sees the same events and actions as the decision log, and besides when they were
dispatched. A step counts from its dispatch, or the end of the step before it on its mesh, to the event of its result.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.protocol.actions import Action, Decode, DecodeRow, Fused, Prefill, Scatter, StartTransfer
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.scheduler.scheduler import Scheduler


class Ran(NamedTuple):
    """A step or a transfer, in seconds on the engine's clock."""

    mesh: int
    begin: float
    end: float
    what: str  # such as "prefill of 256 tokens"
    is_decode: bool  # only decode rows


class Token(NamedTuple):
    """A token of one request, as it was read."""

    t: float
    mesh: int


@dataclass(frozen=True)
class Gap:
    """The time between two tokens of one request."""

    begin: float
    end: float
    meshes: tuple[int, int]  # where the two tokens were computed

    @property
    def seconds(self) -> float:
        """Return its length."""
        return self.end - self.begin


class Watch(Observer):
    """What the engine did since this began to observe it. The clock is the engine's, `time.monotonic`."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.ran: list[Ran] = []
        self.tokens: dict[int, list[Token]] = defaultdict(list)  # by request
        self._ids: dict[bytes, int] = {}  # of requests by their prompts
        self._steps: dict[tuple[int, int], tuple[float, str, bool]] = {}  # dispatched: when, what, whether only decode
        self._free: dict[int, float] = {}  # when the last step of a mesh ended

    def request(self, prompt: Sequence[int]) -> int:
        """Find the request with this prompt, the last of several."""
        return self._ids[_key(prompt)]

    def received(self, message: object) -> None:
        """Take in submissions and results."""
        if isinstance(message, StepResult):
            self._end(message)
        elif isinstance(message, tuple | list):
            for submission in message:
                if isinstance(submission, Submission):
                    self._ids[_key(submission.prompt)] = submission.facts.id

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """Take in what is dispatched now."""
        now = time.monotonic()
        for action in actions:
            match action:
                case Prefill() | Decode() | Fused():
                    self._steps[action.mesh, action.step] = now, _what(action), isinstance(action, Decode)
                case StartTransfer(source=source, destination=destination):
                    pages = sum(map(len, action.source_pages))
                    self.ran.append(Ran(source, now, now, f"gather of {pages} pages for mesh {destination}", False))
                case Scatter(destination=destination):
                    pages = sum(map(len, action.pages))
                    self.ran.append(Ran(destination, now, now, f"scatter of {pages} pages", False))

    def _end(self, result: StepResult) -> None:
        dispatched = self._steps.pop((result.mesh, result.step), None)
        if dispatched is None:  # before this began
            return
        begin, what, is_decode = dispatched
        begin = max(begin, self._free.get(result.mesh, begin))
        self._free[result.mesh] = result.t
        self.ran.append(Ran(result.mesh, begin, result.t, what, is_decode))
        for row in result.rows:
            if isinstance(row, DecodeRow) or row.is_last:
                self.tokens[row.request_id] += [Token(result.t, result.mesh)] * len(result.tokens)

    def gaps(self, request: int, begin: float, end: float) -> list[Gap]:
        """List the gaps of a request that lie in this time, or overlap with it."""
        return [Gap(a.t, b.t, (a.mesh, b.mesh)) for a, b in pairwise(self.tokens[request]) if b.t > begin and a.t < end]

    def causes(self, gap: Gap) -> list[str]:
        """Tell what ran in a gap besides decode steps of its own mesh, the longest first; with none, those."""
        found = [ran for ran in self.ran if ran.end > gap.begin and ran.begin < gap.end and ran.mesh in gap.meshes]
        others = sorted((ran for ran in found if not ran.is_decode), key=lambda ran: ran.begin - ran.end)
        causes = [f"mesh {ran.mesh}: {ran.what}, {1e3 * (ran.end - ran.begin):.0f} ms" for ran in others]
        if gap.meshes[0] != gap.meshes[1]:
            causes.insert(0, f"moved from mesh {gap.meshes[0]} to mesh {gap.meshes[1]}")
        return causes or self._beside(gap)

    def _beside(self, gap: Gap) -> list[str]:
        """Tell what ran on the other meshes, which share the machine's cores on a CPU."""
        found = [ran for ran in self.ran if ran.end > gap.begin and ran.begin < gap.end]
        longest = max(
            (ran for ran in found if ran.mesh in gap.meshes), key=lambda ran: ran.end - ran.begin, default=None
        )
        own = [] if longest is None else [f"its own step, {1e3 * (longest.end - longest.begin):.0f} ms"]
        beside = [ran for ran in found if ran.mesh not in gap.meshes]
        return own + [f"beside it on mesh {ran.mesh}: {ran.what}" for ran in beside[:3]]


def _key(prompt: Any) -> bytes:
    return b",".join(b"%d" % int(token) for token in prompt)


def _what(step: Prefill | Decode | Fused) -> str:
    if isinstance(step, Decode):
        return f"decode of {len(step.rows)} rows"
    tokens = sum(chunk.length for chunk in step.chunks)
    rows = f" and {len(step.rows)} rows" if isinstance(step, Fused) else ""
    return f"prefill of {tokens} tokens in {step.bucket}{rows}"
