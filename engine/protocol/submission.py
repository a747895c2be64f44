"""What passes between callers and the engine's core: a request on its way in, and news of it on the way out."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .actions import FinishReason
from .events import RequestFacts
from .results import TokenScores
from .sampling_plan import SamplingPlan
from .timeline import Timeline


class StopCheck(Protocol):
    """Decides, token by token, whether a request has reached a stop string. One per request; not thread-safe."""

    def push(self, token_id: int) -> str | None:
        """Take the next generated token; the stop string that it completes, if any."""
        ...


@dataclass
class Payload:
    """What the device plane needs of a request: its prompt [n] int32, how to sample, and what it has generated."""

    prompt: np.ndarray
    plan: SamplingPlan
    outputs: list[int] = field(default_factory=list)


class Payloads(dict[str, Payload]):
    """Payloads of the requests in the engine, by name. `scored`: names of those whose tokens are to be scored."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: set[str] = set()

    def __setitem__(self, name: str, payload: Payload) -> None:
        """Take one in."""
        super().__setitem__(name, payload)
        if payload.plan.logprobs is not None:
            self.scored.add(name)

    def __delitem__(self, name: str) -> None:
        """Let one go."""
        super().__delitem__(name)
        self.scored.discard(name)


@dataclass(slots=True)
class Update:
    """News of one request: tokens sampled since the last update, and why it ended (None: it goes on).

    `scores`: of `token_ids`, in pieces, where the request wants log-probabilities. `prompt_scores`: likewise of the
    prompt's tokens but the first, all by the time the first token is out. `stop_reason`: the stop token or string that
    ended it, None for the model's own end. `timeline`: the request's, shared; `cached_tokens`: prompt tokens that the
    prefix cache spared.
    """

    request_id: str
    timeline: Timeline | None = None
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    prompt_scores: list[TokenScores] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached_tokens: int | None = None


class Sink(Protocol):
    """Where updates of a request go; called on the dispatching thread, so it must not block."""

    def put(self, update: Update) -> None:
        """Take one update."""
        ...


@dataclass(frozen=True)
class Submission:
    """A request on its way in, `arrival` in seconds on the engine's clock.

    `eos_ids`: those of the plan's stop ids that end it without a stop reason. `stop` looks for stop strings; None:
    there are none.
    """

    arrival: float
    facts: RequestFacts
    payload: Payload
    eos_ids: frozenset[int]
    stop: StopCheck | None
    sink: Sink
