"""What passes between callers and the core: a request on its way in, and updates on the way out. None of it crosses to
an executor."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.events import RequestFacts
from ..protocol.results import HostScores
from ..protocol.sampling_plan import SamplingPlan
from ..protocol.timeline import Timeline


class StopCheck(Protocol):
    """A check, token by token, for stop strings. Each request has its own; not thread-safe."""

    def push(self, token_id: int) -> str | None:
        """Take the next generated token; return the stop string that it completes, if any."""
        ...


@dataclass(slots=True)
class Update:
    """What is new of a request since its last update."""

    request_id: int
    timeline: Timeline | None = None  # the request's, shared
    token_ids: list[int] = field(default_factory=list)  # sampled since
    scores: list[HostScores] = field(default_factory=list)  # of `token_ids`, in pieces, where they are wanted
    prompt_scores: list[HostScores] = field(default_factory=list)  # of the prompt's tokens but the first, in pieces;
    # all of them have come with the first token
    finish_reason: FinishReason | None = None  # None: it goes on
    stop_reason: int | str | None = None  # the stop token or string that ended it; None: the model's own end
    error: str | None = None
    cached_tokens: int | None = None  # prompt tokens that the prefix cache spared


class Sink(Protocol):
    """The receiver of a request's updates; called on the dispatching thread, so it must not block."""

    def put(self, update: Update) -> None:
        """Receive one update."""
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
