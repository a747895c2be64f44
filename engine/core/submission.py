"""What passes between callers and the core: a request on its way in, and updates on the way out. None of it crosses to
an executor."""

from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.cache_report import PrefixCacheReport
from ..protocol.events import RequestFacts
from ..protocol.results import HostScores
from ..protocol.sampling_plan import SamplingPlan
from ..protocol.timeline import Timeline


class StopCheck(Protocol):
    """A check, token by token, for stop strings. Each request has its own; not thread-safe."""

    def push(self, token_id: int) -> str | None:
        """Take the next generated token; return the stop string that it completes, if any."""
        ...


class Update(msgspec.Struct):
    """What is new of a request since its last update."""

    request_id: int
    timeline: Timeline | None = None  # the scheduler's own, which goes on
    token_ids: list[int] = msgspec.field(default_factory=list)  # sampled since
    scores: list[HostScores] = msgspec.field(default_factory=list)  # of `token_ids`, in pieces, where they are wanted
    # Of the prompt's tokens but the first, in pieces; all of them have come with the first token.
    prompt_scores: list[HostScores] = msgspec.field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: it goes on
    stop_reason: int | str | None = None  # the stop token or string that ended it; None: the model's own end
    error: str | None = None
    cache: PrefixCacheReport | None = None  # what the prefix cache did for the prompt; None until that began

    def merge(self, later: "Update") -> None:
        """Take in the update that comes after this one, which nobody has seen yet."""
        self.timeline, self.cache = later.timeline, later.cache
        self.token_ids += later.token_ids
        self.scores += later.scores
        self.prompt_scores += later.prompt_scores
        self.finish_reason, self.stop_reason, self.error = later.finish_reason, later.stop_reason, later.error


class Outlet(Protocol):
    """Gathers what several sinks were given."""

    def flush(self) -> None:
        """Pass it on, at the end of a turn of the dispatching thread, which must not be held up."""
        ...


class Sink(Protocol):
    """The receiver of a request's updates; called on the dispatching thread, so it must not block."""

    def put(self, update: Update) -> Outlet | None:
        """Take one update; return what is to be flushed once this turn's updates are out, if anything."""
        ...


class Constraint(Protocol):
    """What keeps an answer to a grammar: it is fed each of the answer's tokens once, in order. Each request has its
    own; not thread-safe."""

    @property
    def words(self) -> int:
        """Return the length of a mask."""
        ...

    @property
    def is_over(self) -> bool:
        """Return whether nothing but the end may come."""
        ...

    @property
    def failure(self) -> str | None:
        """Say in a sentence why it cannot be followed any further; None: it can."""
        ...

    def push(self, token: int) -> None:
        """Take the next token."""
        ...

    def fill(self, mask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next in a mask [words] int32, and no others."""
        ...


@dataclass(frozen=True)
class Submission:
    """A request on its way in."""

    arrival: float  # in seconds on the engine's clock
    facts: RequestFacts
    prompt: np.ndarray  # [n] int32
    plan: SamplingPlan
    eos_ids: frozenset[int]  # those of the plan's stop ids that end the request without a stop reason
    stop: StopCheck | None  # looks for stop strings; None: there are none
    sink: Sink
    tokenised: float | None = None  # when its prompt was checked, on the engine's clock; None: on arrival
    entered: float | None = None  # when it was given to the engine; None: on arrival
    after: int | None = None  # the request whose end it waited for; None: it came at a time of its own
    constraint: Constraint | None = None  # keeps its answer to a grammar; None: every token may come
