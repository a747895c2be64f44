"""What the control plane knows of a request: counts and times, never its tokens. No JAX, no clock here.

`Request.move_to` is the only way to change a state, and `TRANSITIONS` the only table of what may follow what.
States follow what has been *dispatched*: a request is in DECODE from the moment its KV is, in device order, in place.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise


class State(StrEnum):
    """Where a request stands. HANDOFF includes waiting for decode pages (credit)."""

    WAITING = "waiting"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


FINAL = frozenset({State.FINISHED, State.ABORTED, State.FAILED})
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILL, State.ABORTED, State.FAILED}),
    State.PREFILL: frozenset({State.HANDOFF, State.DECODE}) | FINAL,
    State.HANDOFF: frozenset({State.DECODE}) | FINAL,
    State.DECODE: FINAL,
} | dict.fromkeys(FINAL, frozenset())


@dataclass
class Timeline:
    """Stamps in seconds on the engine's clock; None until it happens. TTFT counts from arrival, queueing included."""

    arrival: float
    prefill_start: float | None = None
    kv_ready: float | None = None
    finish: float | None = None
    tokens: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float | None:
        """When the first token was sampled, which is when prefill ended."""
        return self.tokens[0] if self.tokens else None

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def e2e(self) -> float | None:
        """Arrival to finish."""
        return None if self.finish is None else self.finish - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (last - first) / (n - 1), for n >= 2 tokens."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the raw gaps between tokens."""
        return [b - a for a, b in pairwise(self.tokens)]

    @property
    def handoff(self) -> float | None:
        """First token to KV ready on the decode mesh; 0 where another thread stamped the KV first."""
        if self.kv_ready is None or self.first_token is None:
            return None
        return max(0.0, self.kv_ready - self.first_token)


@dataclass(frozen=True)
class Placement:
    """A request's seat on one mesh: a slot, the slot's epoch (which tenant this is), and its KV pages in order."""

    mesh: int
    slot: int
    epoch: int
    pages: tuple[int, ...]


@dataclass(eq=False)
class Request:
    """One request as the scheduler sees it.

    `prefilled`: prompt tokens dispatched. `dispatched`: output tokens whose step was dispatched. `confirmed`: output
    tokens read back. `home`: where its KV is; `credit`: where a hand-off will put it.
    """

    id: str
    prompt_len: int
    max_tokens: int
    timeline: Timeline
    state: State = State.WAITING
    prefilled: int = 0
    dispatched: int = 0
    confirmed: int = 0
    home: Placement | None = None
    credit: Placement | None = None

    @property
    def can_decode(self) -> bool:
        """Whether another decode step may be dispatched: in DECODE, with tokens left to ask for."""
        return self.state is State.DECODE and self.dispatched < self.max_tokens

    def move_to(self, state: State) -> None:
        """Change state; a transition that is not in the table is a bug in the scheduler, and raises."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state} cannot become {state}")
        self.state = state
