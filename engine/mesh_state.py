"""What the scheduler keeps about one mesh and about one transfer. Facts and bookkeeping; policy is `scheduler.py`'s.

Control-plane module: no JAX here.
"""

from collections import deque
from dataclasses import dataclass, field

from .config import MeshSpec
from .pages import PageAllocator, SlotTable
from .request import Placement, Request

# The host dispatches step n + 1 before it reads step n, and no further ahead: a deeper queue would delay arrivals.
MAX_STEPS_IN_FLIGHT = 2


@dataclass
class MeshState:
    """One mesh as the scheduler sees it.

    `staging`: pages that may be on their way in or out. `unanswered`: prompts admitted here whose first token was not
    read yet. `prefilling`: those of them with chunks left, first come first.
    """

    index: int
    spec: MeshSpec
    pages: PageAllocator
    slots: SlotTable
    staging: int
    unanswered: dict[str, Request] = field(default_factory=dict)
    prefilling: deque[Request] = field(default_factory=deque)
    decoding: dict[str, Request] = field(default_factory=dict)
    in_flight: set[int] = field(default_factory=set)
    last_was_prefill: bool = False

    @property
    def can_step(self) -> bool:
        """Whether another step may be dispatched."""
        return len(self.in_flight) < MAX_STEPS_IN_FLIGHT

    @property
    def prefill_load(self) -> int:
        """Prompt tokens admitted whose first token is still to come: what a new prompt would wait for."""
        return sum(request.prompt_len for request in self.unanswered.values())

    def has_room(self, pages: int) -> bool:
        """Whether a slot and this many pages are free."""
        return self.slots.num_free > 0 and self.pages.can_allocate(pages)

    def seat(self, request: Request, pages: int) -> Placement:
        """Reserve a slot and pages, all at once; the caller has asked `has_room`."""
        slot, epoch = self.slots.allocate(request.id)
        return Placement(self.index, slot, epoch, self.pages.allocate(request.id, pages))

    def unseat(self, request: Request, placement: Placement) -> None:
        """Give a seat back."""
        self.slots.release(placement.slot)
        self.pages.release(request.id)


@dataclass(eq=False)
class Handoff:
    """A transfer under way: whose, between which meshes, its staging, and whether it has arrived there."""

    request: Request
    source: int
    destination: int
    staged_pages: int
    is_ready: bool = False
