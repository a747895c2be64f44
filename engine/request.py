"""What the control plane knows of a request: counts, block hashes and times, never its tokens. No JAX, no clock here.

`Request.move_to` is the only way to change a state, and `TRANSITIONS` the only table of what may follow what.
States follow what has been *dispatched*: a request is in DECODE from the moment its KV is, in device order, in place.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from .seat import Handoff, Seat


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
    State.PREFILL: frozenset({State.HANDOFF, State.DECODE, State.WAITING}) | FINAL,
    State.HANDOFF: frozenset({State.DECODE, State.WAITING}) | FINAL,
    State.DECODE: frozenset({State.HANDOFF, State.WAITING}) | FINAL,
} | dict.fromkeys(FINAL, frozenset())


@dataclass
class Timeline:
    """Stamps in seconds on the engine's clock; None until it happens. TTFT counts from arrival, queueing included.

    After a preemption or a lost mesh the stamps of the first run stay; `tokens` are stamped when they are read.
    """

    arrival: float
    prefill_start: float | None = None
    prefill_end: float | None = None
    kv_ready: float | None = None
    finish: float | None = None
    tokens: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float | None:
        """When the first token was sampled."""
        return self.tokens[0] if self.tokens else None

    @property
    def second_token(self) -> float | None:
        """When the second token was sampled: on a mesh of its own, the first that decode gave."""
        return self.tokens[1] if len(self.tokens) > 1 else None

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
class RequestFacts:
    """A request as it arrives.

    `block_hashes`: one per full page of the prompt, each a hash of all tokens up to the page's end (`hashing.py`);
    empty: the request neither reads nor feeds the prefix cache. `fork_of`: the request whose prompt this one shares to
    the last token, submitted before it (`n > 1`).
    """

    id: str
    prompt_len: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    fork_of: str | None = None


@dataclass(eq=False)
class Request:
    """One request as the scheduler sees it.

    `number`: its place in the order of arrival. `run`: a number that no other start of any request has; results of an
    earlier run are void. `restarts`: how often it started over, `retries`: how many of these were for a failure.
    `to_prefill`: tokens that this run prefills, the prompt and after a preemption what it has generated. `prefilled`:
    of these, in the cache or dispatched. `dispatched`: output tokens whose step was dispatched. `confirmed`: output
    tokens read back. `forced`: output tokens that this run feeds as they were generated before. `hashes`: of its full
    pages, as far as their tokens are known. `home`: where its KV is; `handoff`: where it is going. `cached`: prompt
    tokens that the prefix cache spared its first run, None until that begins. `awaits`: the block that another request
    is computing for it. `lost_on`: the mesh whose failure it has survived last. `suspects`: a mesh from which a
    transfer failed, so that it may be lost.
    """

    facts: RequestFacts
    number: int
    timeline: Timeline
    state: State = State.WAITING
    run: int = 0
    restarts: int = 0
    retries: int = 0
    to_prefill: int = 0
    prefilled: int = 0
    dispatched: int = 0
    confirmed: int = 0
    forced: int = 0
    cached: int | None = None
    awaits: bytes | None = None
    lost_on: int | None = None
    suspects: int | None = None
    hashes: list[bytes] = field(default_factory=list)
    home: Seat | None = None
    handoff: Handoff | None = None

    def __post_init__(self) -> None:
        """What is looked at in every step lies at hand."""
        self.id, self.prompt_len, self.max_tokens = self.facts.id, self.facts.prompt_len, self.facts.max_tokens

    @property
    def can_decode(self) -> bool:
        """Whether another decode step may be dispatched: in DECODE, with tokens left to ask for."""
        return self.state is State.DECODE and self.dispatched < self.max_tokens

    @property
    def kv_len(self) -> int:
        """Tokens in the cache, those of dispatched steps included: all but the one sampled last."""
        return self.prompt_len + self.dispatched - 1 if self.dispatched else self.prefilled

    def move_to(self, state: State) -> None:
        """Change state; a transition that is not in the table is a bug in the scheduler, and raises."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state} cannot become {state}")
        self.state = state


def by_arrival(request: Request) -> int:
    """Sort key: first come, first served."""
    return request.number
