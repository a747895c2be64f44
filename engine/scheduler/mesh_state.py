"""What the scheduler keeps about one mesh. Facts and bookkeeping only: `policy.py` ranks, `batching.py` decides.

Invariants: `placed` is the one list of requests here. Those with chunks left and those that decode follow from it;
`add` and `remove` alone change it. A mesh that could run another step is in `due`, so nobody has to ask the others.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from sortedcontainers import SortedKeyList

from ..config import EngineConfig, PoolSize
from ..metrics.counters import Counters
from ..paging.block_table import Placement
from ..paging.mesh_pages import MeshPages
from ..paging.prefix_index import PrefixIndex
from ..paging.room import RoomChanges
from ..protocol.actions import Action
from ..topology import MeshSpec, Role
from .cost import PRIORS, Costs, Priors
from .expected_blocks import ExpectedBlocks
from .interactive import Interactive
from .kept_pages import KeptPages
from .notes import Notes
from .priority_levels import PriorityLevels
from .request import Request, State
from .sessions import Sessions
from .tpot_targets import Targets

# The host dispatches step n + 1 before it reads step n, and no further ahead: a deeper queue would delay arrivals.
MAX_STEPS_IN_FLIGHT = 2

# What a mesh of a pool may have to do yet of a role that it has no more.
Phase = Literal["prefill", "decode"]

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
    role: Role  # in a pool it changes, by `take_role` alone
    pages: MeshPages
    staging: int  # bytes left for transfers out or in
    shared: "SharedState"
    page_bytes: int = 0  # of a page in every cache group, as hand-offs carry it
    placed: SortedRequests = field(default_factory=sorted_requests)  # all with a placement here, or reserved
    prefill_load: int = 0  # prompt tokens to compute whose first output token was not read: what a new prompt waits for
    begun: int = 0  # those of them whose step was dispatched
    batch_load: int = 0  # what of it batch prompts make up, for which an interactive one does not wait
    targets: Targets = field(default_factory=Targets)  # of those in `placed`
    in_flight: set[int] = field(default_factory=set)  # steps not read yet
    last_was_prefill: bool = False
    batch: int = 0  # how many of `placed` use what interactive requests leave
    constrained: int = 0  # how many of `placed` have no step run ahead
    holds_back: bool = False  # some of its work, until a step that is in flight ends
    draining: Phase | None = None  # work of a phase that its role has no more; it takes none anew
    prefills: bool = field(init=False)  # whether prompts may come here
    decodes: bool = field(init=False)  # whether requests may come here to be decoded, and prompts stay to be

    def __post_init__(self) -> None:
        """Begin in its role, and expect no blocks."""
        self.prefills, self.decodes = self.role.prefills, self.role.decodes
        self.computing = ExpectedBlocks(self.index, self.shared.computing)
        self.arriving = ExpectedBlocks(self.index, self.shared.arriving)
        self.kept = KeptPages(self.pages.groups)
        self.shared.room.touch(self.index)

    def take_role(self, role: Role) -> None:
        """Change the role: what it adds is taken at once, what it has no more is left to `draining`."""
        self.role, self.prefills, self.decodes = role, role.prefills, role.decodes
        self.drain(None)

    def drain(self, phase: Phase | None) -> None:
        """Note what phase there is work left of that the role has no more."""
        self.draining = phase
        self.shared.room.more(self.index)
        self.wake()

    @property
    def shown_role(self) -> str:
        """Return the role as people read it, with what is left of the one before."""
        return self.role.value if self.draining is None else f"{self.role} (draining {self.draining})"

    @property
    def _runs_decodes(self) -> bool:
        return self.decodes or self.draining == "decode"

    @property
    def watermark(self) -> int:
        """Return how many pages of each group to leave to the requests that are here and grow: one for each."""
        return len(self.placed) if self._runs_decodes else 0

    @property
    def load(self) -> int:
        """Return what a new prompt would wait for, in tokens: the prompts to compute, and a page for each request.

        A page is a rough price of the decode steps between chunks, and what a block that all prompts share may draw.
        """
        return self.prefill_load + self.pages.page_size * len(self.placed)

    @property
    def to_compute(self) -> int:
        """Return the prompt tokens of requests here whose step was not dispatched yet."""
        return self.prefill_load - self.begun

    def to_compute_before(self, request: Request) -> int:
        """Return likewise those that this request would wait for: an interactive one waits for no batch work."""
        return self.to_compute if request.is_batch else max(0, self.to_compute - self.batch_load)

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
        if not self._runs_decodes:
            return []
        state = State.DECODE
        if self.constrained:
            return [
                request
                for request in self.placed
                if request.state is state
                and request.dispatched < request.max_tokens
                and not (request.is_constrained and request.runs_ahead)
            ]
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
        self.targets.add(request.tpot_target)
        self.batch += request.is_batch
        self.constrained += request.is_constrained
        self.wake()

    def load_before(self, request: Request) -> int:
        """Return what of the load this prompt would wait for: an interactive one waits for no batch work."""
        return self.load if request.is_batch else self.load - self.batch_load - self.pages.page_size * self.batch

    def change_load(self, tokens: int, *, is_batch: bool) -> None:
        """Add prompt tokens to compute, or take them off."""
        self.prefill_load += tokens
        if is_batch:
            self.batch_load += tokens
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
        self.targets.remove(request.tpot_target)
        self.batch -= request.is_batch
        self.constrained -= request.is_constrained
        self.wake()
        return ended

    def check(self) -> None:
        """Raise unless this mesh is in `due` if it could run another step, and is listed with the blocks it expects."""
        if self.batch != sum(request.is_batch for request in self.placed):
            raise RuntimeError(f"mesh {self.index}: {self.batch} batch requests counted, not those that are here")
        if self.constrained != sum(request.is_constrained for request in self.placed):
            raise RuntimeError(f"mesh {self.index}: {self.constrained} constrained requests counted, not those here")
        has_work = (self.prefilling() or self.ready()) and not (self.holds_back and self.in_flight)
        if has_work and len(self.in_flight) < MAX_STEPS_IN_FLIGHT and self.index not in self.shared.due:
            raise RuntimeError(f"mesh {self.index} could run another step and would not be asked to")
        if not self._runs_decodes and any(request.state is State.DECODE for request in self.placed):
            raise RuntimeError(f"mesh {self.index} has requests to decode and the role {self.shown_role}")
        self.targets.check(Counter(request.tpot_target for request in self.placed))
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
    """What the parts of one engine's scheduler share: its requests and meshes, and what all of them write to."""

    config: EngineConfig
    emit: Callable[[Action], None]  # takes the actions
    priors: Priors = PRIORS  # what work costs before any was measured
    requests: dict[int, Request] = field(default_factory=dict)  # by id; those that have not ended
    meshes: list["MeshState"] = field(init=False)
    counters: Counters = field(default_factory=Counters)
    notes: Notes = field(default_factory=Notes)  # why it was decided so, for the decision log
    costs: Costs = field(init=False)
    index: PrefixIndex = field(default_factory=PrefixIndex)  # where which blocks are cached
    room: RoomChanges = field(default_factory=RoomChanges)  # where slots, pages or work changed
    levels: PriorityLevels = field(default_factory=PriorityLevels)  # which classes and priorities have requests where
    due: set[int] = field(default_factory=set)  # meshes that may have another step to run
    computing: dict[bytes, int] = field(default_factory=dict)  # block -> the meshes that are to compute it, a bit each
    arriving: dict[bytes, int] = field(default_factory=dict)  # likewise of blocks on their way to a mesh
    interactive: Interactive = field(default_factory=Interactive)  # whether some are about
    sessions: Sessions = field(init=False)  # what conversations have left behind

    def __post_init__(self) -> None:
        """Begin with nothing measured, and without meshes."""
        self.costs = Costs(self.config, self.notes, self.priors)
        self.sessions = Sessions(self.index.lost)
        self.meshes = []


def shared_state(
    config: EngineConfig, pools: Iterable[PoolSize], emit: Callable[[Action], None], priors: Priors = PRIORS
) -> SharedState:
    """Make what an engine without requests begins with; `pools[i]` is the size of mesh i's KV memory."""
    shared = SharedState(config, emit, priors)
    for index, (spec, pool) in enumerate(zip(config.topology.meshes, pools, strict=True)):
        pages = MeshPages(index, config, pool.pages, emit, shared.index, shared.room)
        role, page_bytes = config.starting_role(index), sum(pool.sent_pages)
        shared.meshes.append(MeshState(index, spec, role, pages, pool.staging_bytes, shared, page_bytes))
    return shared
