"""What the scheduler keeps about one mesh. Facts and bookkeeping; policy is `scheduler.py`'s.

Control-plane module: no JAX here.
"""

from dataclasses import dataclass, field

from ..paging.block_table import Seat
from ..paging.mesh_pages import MeshCache
from ..topology import MeshSpec
from .request import Request, State

# The host dispatches step n + 1 before it reads step n, and no further ahead: a deeper queue would delay arrivals.
MAX_STEPS_IN_FLIGHT = 2


@dataclass
class MeshState:
    """One mesh as the scheduler sees it.

    `seated`: who sits here, or is on the way here. `unanswered`: those admitted here whose first token was not read
    yet, and the prompt tokens to compute for each. `prefilling`: those with chunks left, in order of arrival.
    `computing`: hashes of the blocks that they have yet to compute, and who will. `arriving`: likewise of blocks on
    their way here. `staging`: bytes left for transfers
    out or in. `in_flight`: steps not read yet.
    """

    index: int
    spec: MeshSpec
    cache: MeshCache
    staging: int
    seated: dict[int, Request] = field(default_factory=dict)
    unanswered: dict[int, int] = field(default_factory=dict)
    prefilling: list[Request] = field(default_factory=list)
    decoding: dict[int, Request] = field(default_factory=dict)
    computing: dict[bytes, Request] = field(default_factory=dict)
    arriving: dict[bytes, Request] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)
    last_was_prefill: bool = False

    @property
    def can_step(self) -> bool:
        """Whether another step may be dispatched."""
        return len(self.in_flight) < MAX_STEPS_IN_FLIGHT

    @property
    def prefill_load(self) -> int:
        """Prompt tokens to compute whose first output token is still to come: what a new prompt would wait for."""
        return sum(self.unanswered.values())

    @property
    def watermark(self) -> int:
        """Pages of each group to leave to those who are here and grow: one each."""
        return len(self.seated) if self.spec.decodes else 0

    @property
    def is_backed_up(self) -> bool:
        """Whether half of a group's pages hold KV that waits for credit elsewhere; no prompt is admitted then."""
        homes = [
            request.home
            for request in self.seated.values()
            if request.state is State.HANDOFF and request.home is not None and request.home.mesh == self.index
        ]
        return any(
            2 * len({page for home in homes for page in home.tables[group].pages}) > pages.num_pages
            for group, pages in enumerate(self.cache.groups)
        )

    def forget_arriving(self, request: Request) -> None:
        """What was on its way for this request is here, or will not come."""
        self.arriving = {key: by for key, by in self.arriving.items() if by is not request}

    def unseat(self, request: Request, seat: Seat) -> None:
        """The request leaves its seat here."""
        self.cache.leave(seat)
        del self.seated[request.id]
