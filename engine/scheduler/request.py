"""What the scheduler knows of a request: counts, block hashes, places and times, never its tokens. No clock here.

`Request.move_to` is the only way to change a state, and `TRANSITIONS` the only table of what may follow what. States
follow what has been *dispatched*: a request is in DECODE from the moment its KV is, in device order, in place.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from ..paging.block_table import Placement
from ..protocol.cache_report import PrefixCacheReport
from ..protocol.events import RequestFacts
from ..protocol.service import SLO, Service
from ..protocol.timeline import Timeline
from .priority_levels import Level
from .tpot_targets import tpot_target


class State(StrEnum):
    """Where a request stands. HANDOFF includes waiting for decode pages (credit)."""

    WAITING = "waiting"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"
    EXPIRED = "expired"


FINAL = frozenset({State.FINISHED, State.ABORTED, State.FAILED, State.EXPIRED})
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILL, State.ABORTED, State.FAILED, State.EXPIRED}),
    State.PREFILL: frozenset({State.HANDOFF, State.DECODE, State.WAITING}) | FINAL,
    State.HANDOFF: frozenset({State.DECODE, State.WAITING}) | FINAL,
    State.DECODE: frozenset({State.HANDOFF, State.WAITING}) | FINAL,
} | dict.fromkeys(FINAL, frozenset())


# A block that is being computed or is on its way to a mesh, or the id of a request that is to be forked.
type Awaited = bytes | int


@dataclass(eq=False, slots=True)
class Wait:
    """What requests sleep for; those that sleep for the same share one."""

    key: Awaited


@dataclass(eq=False, slots=True)
class Transfer:
    """Pages of one request on their way from one mesh to another."""

    number: int
    source: int  # the mesh they come from
    destination: int  # and the one they go to
    staged: tuple[int, int]  # bytes of staging taken on source and destination
    pages: tuple[tuple[int, ...], ...]  # per cache group, those they will be written to
    has_state: bool  # the last of a hand-off, with the request's state
    request_id: int | None  # None once the transfer is not needed any more
    is_ready: bool = False  # it has arrived in the destination's staging


@dataclass(eq=False, slots=True)
class Handoff:
    """A request's way to another mesh."""

    placement: Placement  # what is reserved at the destination (credit)
    unsent: list[int]  # per cache group, the first page of the sequence that was not sent yet
    transfers: deque[Transfer] = field(default_factory=deque)  # those under way, in the order in which they were sent
    has_sent: bool = False  # whether any was sent


@dataclass(eq=False, slots=True)
class Request:
    """One request as the scheduler sees it. A run is one start of it: each time it starts over, another begins."""

    facts: RequestFacts
    number: int  # its place in the order of arrival
    timeline: Timeline
    tokens_before: int = 0  # prompt tokens of all requests that arrived before it
    slo: SLO | None = None  # its own, or the engine's
    accepted: float = 0.0  # when it was, by the scheduler's time: never before one that was accepted earlier
    delay: float = 0.0  # seconds by which its priority puts it behind one of priority 0 that is accepted with it
    delay_tokens: int = 0  # likewise in prompt tokens, for orders that go by work
    level: Level = (0, 0)  # its class and priority
    order: tuple[Any, ...] = (0, 0, 0)  # its place in the one order (`order.py`), fixed when it arrives
    state: State = State.WAITING
    run: int = 0  # a number that no other run of any request has; results of earlier runs are void
    restarts: int = 0  # how often it started over
    retries: int = 0  # how many of these were for a failure
    preempted: int = 0  # and how many to make way for others
    to_prefill: int = 0  # tokens that this run prefills: the prompt and, after a preemption, what it has generated
    prefilled: int = 0  # of these, in the cache or dispatched
    dispatched: int = 0  # output tokens whose step was dispatched; 0 until the last chunk is
    confirmed: int = 0  # output tokens read back
    forced: int = 0  # output tokens that this run feeds as they were generated before
    unanswered: int = 0  # prompt tokens that count in its mesh's `prefill_load` until the run's first token is read
    begun: int = 0  # those of them whose step was dispatched
    prefilled_on: int = 0  # the mesh that `unanswered` counts on
    cache: PrefixCacheReport | None = None  # what the prefix cache did for its first run; None until that begins
    home: int | None = None  # where its conversation's KV was left, of the meshes that it could go to when last asked
    wait: "Wait | None" = None  # what it sleeps for; None: it is awake
    lost_on: int | None = None  # the mesh whose failure it has survived last
    suspects: int | None = None  # a mesh from which a transfer failed, so that it may be lost
    hashes: list[bytes] = field(default_factory=list)  # of its full pages, as far as their tokens are known
    unshared: list[bytes] = field(default_factory=list)  # in deterministic mode, of the pages that its answer fills
    is_remembered: bool = False  # it has ended, and its conversation remembers what it has left behind
    siblings: list["Request"] = field(default_factory=list)  # those that fork it, in order of arrival
    placement: Placement | None = None  # where its KV is
    handoff: Handoff | None = None  # where its KV is going
    id: int = field(init=False)
    prompt_len: int = field(init=False)
    max_tokens: int = field(init=False)
    tpot_target: float = field(init=False)  # seconds, see `tpot_targets.py`
    is_batch: bool = field(init=False)  # it uses what interactive requests leave
    is_constrained: bool = field(init=False)  # no step of it runs ahead

    def __post_init__(self) -> None:
        """Copy the facts that every step reads."""
        self.tpot_target = tpot_target(self.slo)
        self.id, self.prompt_len, self.max_tokens = self.facts.id, self.facts.prompt_len, self.facts.max_tokens
        self.is_batch, self.is_constrained = self.facts.service.is_batch, self.facts.is_constrained

    def serve(self, service: Service) -> None:
        """Take in how the request is to be served from here on."""
        self.facts = replace(self.facts, service=service)
        self.is_batch = service.is_batch

    @property
    def sleeps_for(self) -> Awaited | None:
        """Return what the request sleeps for; None: it is awake."""
        return None if self.wait is None else self.wait.key

    @property
    def kv_len(self) -> int:
        """Return the number of tokens in the cache, dispatched steps included: all but the one sampled last."""
        return self.prompt_len + self.dispatched - 1 if self.dispatched else self.prefilled

    @property
    def runs_ahead(self) -> bool:
        """Return whether a token of it is computed that is not read, of this run or of its prompt's last chunk."""
        return self.dispatched > self.confirmed

    @property
    def has_row_ahead(self) -> bool:
        """Return whether such a token is of a decode step."""
        return self.dispatched > max(self.confirmed, self.to_prefill - self.prompt_len + 1)

    @property
    def has_begun(self) -> bool:
        """Return whether a chunk of this run was dispatched; until then only what the cache spares is prefilled."""
        return bool(self.dispatched) or max(1, self.to_prefill - self.prefilled) != self.unanswered

    def move_to(self, state: State) -> None:
        """Change the state; a transition that is not in the table is a bug in the scheduler, and raises."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state} cannot become {state}")
        self.state = state
