"""What the scheduler keeps about one mesh. Facts and bookkeeping only: `policy.py` ranks, `batching.py` decides.

Invariants: `placed` is the one list of requests here. Those with chunks left and those that decode follow from it;
`add` and `remove` alone change it. A mesh that could run another step is in `due`, so nobody has to ask the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from sortedcontainers import SortedKeyList

from ..config import EngineConfig, PoolSize
from ..paging.block_table import Placement
from ..paging.mesh_pages import MeshPages
from ..paging.prefix_index import PrefixIndex
from ..paging.room import RoomChanges
from ..protocol.actions import Action
from ..topology import MeshSpec
from .expected_blocks import ExpectedBlocks
from .kept_pages import KeptPages
from .levels import Levels
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
    shared: "SharedState"
    placed: SortedRequests = field(default_factory=sorted_requests)  # all with a placement here, or reserved
    prefill_load: int = 0  # prompt tokens to compute whose first output token was not read: what a new prompt waits for
    in_flight: set[int] = field(default_factory=set)  # steps not read yet
    last_was_prefill: bool = False
    prefills: bool = field(init=False)  # whether prompts may run here
    decodes: bool = field(init=False)  # whether tokens may be decoded here

    def __post_init__(self) -> None:
        """Take the role of the topology, and expect no blocks."""
        self.prefills, self.decodes = self.spec.prefills, self.spec.decodes
        self.computing = ExpectedBlocks(self.index, self.shared.computing)
        self.arriving = ExpectedBlocks(self.index, self.shared.arriving)
        self.kept = KeptPages(self.pages.groups)
        self.shared.room.touch(self.index)

    @property
    def watermark(self) -> int:
        """Return how many pages of each group to leave to the requests that are here and grow: one for each."""
        return len(self.placed) if self.decodes else 0

    @property
    def load(self) -> int:
        """Return what a new prompt would wait for, in tokens: the prompts to compute, and a page for each request.

        A page is a rough price of the decode steps between chunks, and what a block that all prompts share may draw.
        """
        return self.prefill_load + self.pages.page_size * len(self.placed)

    @property
    def is_backed_up(self) -> bool:
        """Return whether KV waits for credit elsewhere, and with that of the prompts here, which will wait behind it,
        takes over half of a group; no prompt is admitted then. So never more than half and one prompt wait."""
        return self.kept.are_too_many()

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

    def ready(self) -> list[Request]:
        """List the requests of which another decode step may be dispatched, in the policy's order."""
        if not self.decodes:
            return []
        state = State.DECODE
        return [
            request for request in self.placed if request.state is state and request.dispatched < request.max_tokens
        ]

    def give_way(self, request: Request) -> Sequence[Request]:
        """List the requests that may be preempted for this one: itself, and those after it in the policy's order.

        The first request of the mesh is never among them, and therefore always finishes.
        """
        return self.placed[max(1, self.placed.index(request)) :]

    def wake(self) -> None:
        """Note that another step may be possible here."""
        self.shared.due.add(self.index)

    def add(self, request: Request) -> None:
        """Add a request that was given a placement here."""
        self.placed.add(request)
        self.shared.levels.enter(request.level, self.index)
        self.wake()

    def change_load(self, tokens: int) -> None:
        """Add prompt tokens to compute, or take them off."""
        self.prefill_load += tokens
        self.shared.room.touch(self.index)

    def end_wait(self, placement: Placement) -> list[bytes]:
        """Strike out blocks that the placement was to bring and that are here, or will not come; return those."""
        ended, placement.underway = placement.underway, []
        if ended:
            self.computing.give_up(placement, ended)
            self.arriving.give_up(placement, ended)
        return ended

    def remove(self, request: Request, placement: Placement) -> list[bytes]:
        """Free the request's placement here; return the blocks that were first expected from it."""
        ended = self.end_wait(placement)
        self.pages.release(placement)
        self.placed.remove(request)
        self.shared.levels.leave(request.level, self.index)
        self.wake()
        return ended

    def check(self) -> None:
        """Raise unless this mesh is in `due` if it could run another step, and is listed with the blocks it expects."""
        has_work = self.prefilling() or self.ready()
        if has_work and len(self.in_flight) < MAX_STEPS_IN_FLIGHT and self.index not in self.shared.due:
            raise RuntimeError(f"mesh {self.index} could run another step and would not be asked to")
        self.computing.check()
        self.arriving.check()
        self.kept.check(
            [
                request.placement
                for request in self.placed
                if request.state is State.HANDOFF
                and request.placement is not None
                and request.placement.mesh == self.index
            ]
        )


@dataclass
class SharedState:
    """What all meshes of an engine write to, so that it is found in one place."""

    index: PrefixIndex = field(default_factory=PrefixIndex)  # where which blocks are cached
    room: RoomChanges = field(default_factory=RoomChanges)  # where slots, pages or work changed
    levels: Levels = field(default_factory=Levels)  # which classes and priorities have requests where
    due: set[int] = field(default_factory=set)  # meshes that may have another step to run
    computing: dict[bytes, int] = field(default_factory=dict)  # block -> the meshes that are to compute it, a bit each
    arriving: dict[bytes, int] = field(default_factory=dict)  # likewise of blocks on their way to a mesh


def new_mesh(
    index: int,
    config: EngineConfig,
    spec: MeshSpec,
    pool: PoolSize,
    shared: SharedState,
    emit: Callable[[Action], None],
) -> MeshState:
    """Make a mesh without requests; `emit` takes the actions that change its page tables."""
    pages = MeshPages(index, config, pool.pages, emit, shared.index, shared.room)
    return MeshState(index, spec, pages, pool.staging_bytes, shared)
