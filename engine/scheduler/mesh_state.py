"""What the scheduler keeps about one mesh. Facts and bookkeeping only: `policy.py` ranks, `batching.py` decides.

Invariant: `placed` is the one list of requests here. Those with chunks left and those that decode follow from it, and
`remove` alone takes a request off the mesh.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from sortedcontainers import SortedKeyList

from ..paging.block_table import Placement
from ..paging.mesh_pages import MeshPages
from ..topology import MeshSpec
from .request import Request, State

# The host dispatches step n + 1 before it reads step n, and no further ahead: a deeper queue would delay arrivals.
MAX_STEPS_IN_FLIGHT = 2

in_order = attrgetter("order")
type SortedRequests = SortedKeyList[Request, Any]


def sorted_requests() -> SortedRequests:
    """Make an empty list of requests that keeps the policy's order."""
    return SortedKeyList(key=in_order)


@dataclass
class MeshState:
    """One mesh as the scheduler sees it."""

    index: int
    spec: MeshSpec
    pages: MeshPages
    staging: int  # bytes left for transfers out or in
    placed: SortedRequests = field(default_factory=sorted_requests)  # all with a placement here, or reserved
    prefill_load: int = 0  # prompt tokens to compute whose first output token was not read: what a new prompt waits for
    computing: dict[bytes, Placement] = field(default_factory=dict)  # blocks that placements here have yet to compute
    arriving: dict[bytes, Placement] = field(default_factory=dict)  # blocks on their way to placements here
    in_flight: set[int] = field(default_factory=set)  # steps not read yet
    last_was_prefill: bool = False
    prefills: bool = field(init=False)  # whether prompts may run here
    decodes: bool = field(init=False)  # whether tokens may be decoded here

    def __post_init__(self) -> None:
        self.prefills, self.decodes = self.spec.prefills, self.spec.decodes

    @property
    def watermark(self) -> int:
        """Return how many pages of each group to leave to the requests that are here and grow: one for each."""
        return len(self.placed) if self.decodes else 0

    @property
    def is_backed_up(self) -> bool:
        """Return whether KV that waits for credit elsewhere fills over half of a group; no prompt is admitted then."""
        waiting = [
            request.placement
            for request in self.placed
            if request.state is State.HANDOFF and request.placement is not None and request.placement.mesh == self.index
        ]
        return any(
            2 * len({page for placement in waiting for page in placement.tables[group].pages}) > pages.num_pages
            for group, pages in enumerate(self.pages.groups)
        )

    def prefilling(self) -> list[Request]:
        """List the requests with prompt chunks left, in the policy's order."""
        if not self.prefill_load:  # each of them counts in it
            return []
        state = State.PREFILL
        return [
            request
            for request in self.placed
            if request.state is state
            and not request.dispatched
            and request.placement is not None
            and request.placement.mesh == self.index
        ]

    def decoding(self) -> list[Request]:
        """List the requests in DECODE, in the policy's order."""
        if not self.decodes:
            return []
        state = State.DECODE
        return [request for request in self.placed if request.state is state]

    def give_way(self, request: Request) -> Sequence[Request]:
        """List the requests that may be preempted for this one: itself, and those after it in the policy's order.

        The first request of the mesh is never among them, and therefore always finishes.
        """
        return self.placed[max(1, self.placed.index(request)) :]

    def expect(self, index: dict[bytes, Placement], hashes: Iterable[bytes], placement: Placement) -> None:
        """Enter blocks in `index` (`computing` or `arriving`), unless another placement is to bring them first."""
        placement.underway += [key for key in hashes if index.setdefault(key, placement) is placement]

    def end_wait(self, placement: Placement) -> None:
        """Remove the blocks that the placement was to bring, since they are here or will not come."""
        for key in placement.underway:
            for index in (self.computing, self.arriving):
                if index.get(key) is placement:
                    del index[key]
        placement.underway.clear()

    def remove(self, request: Request, placement: Placement) -> None:
        """Take the request off this mesh, and free its placement."""
        self.end_wait(placement)
        self.pages.release(placement)
        self.placed.remove(request)
