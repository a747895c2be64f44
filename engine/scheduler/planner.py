"""Which roles the meshes of a pool should have: from a window of observations and a target to a plan and its reason.

A pure function: no clock, no randomness, no state. What it looks at and how it acts is elsewhere (`planning.py`), how
well a split of the meshes is predicted to do as well (`prediction.py`). Invariants: every phase keeps a mesh; roles
change only where the predicted goodput grows by at least `Rules.gain`, and a prediction does not depend on the roles of
the moment, so under observations that stay the same no split ever comes back; nothing is planned on observations that
are missing or old; a mesh is taken from a phase only where that phase is predicted to do without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..protocol.service import SLO
from .line_fit import Terms

# Why a plan is as it is. The sentence of each is in `SENTENCES`.
Reason = Literal[
    "few arrivals",
    "not measured",
    "changing",
    "dwell",
    "meets",
    "better",
    "more prefill",
    "more decode",
    "saturated",
    "separate again",
    "one fewer misses",
    "no gain",
    "out of reach",
]

SENTENCES: dict[Reason, str] = {
    "few arrivals": "too few requests came lately to plan by: the roles stay",
    "not measured": "prompts or decode steps were not measured yet: the roles stay",
    "changing": "meshes still take the roles that they were given last: these stay",
    "dwell": "other roles would do better, and the last change is too recent",
    "meets": "the roles meet the target",
    "better": "the roles meet the target, and others would do better by more than the error of a prediction",
    "more prefill": "prompts would miss the target with the meshes that prefill now",
    "more decode": "tokens would miss the target with the meshes that decode now",
    "saturated": "prefill and decode apart would both miss the target: more meshes do both",
    "separate again": "prefill and decode apart would do better than meshes that do both",
    "one fewer misses": "other roles would do better, and the phase that gives a mesh up would miss the target",
    "no gain": "the roles miss the target, and none would do better by more than the error of a prediction",
    "out of reach": "no roles meet the target: these are the best",
}


class Split(NamedTuple):
    """How many meshes of a pool have which role."""

    prefill: int
    decode: int
    both: int

    @property
    def is_served(self) -> bool:
        """Return whether both phases have a mesh."""
        return self.prefill + self.both > 0 and self.decode + self.both > 0

    def __str__(self) -> str:
        """Write it as `roles=` is written."""
        return ",".join(f"{name}={count}" for name, count in zip(self._fields, self, strict=True) if count)


class Pair(NamedTuple):
    """The lengths of one request that has ended: both, since they depend on each other."""

    to_compute: int  # prompt tokens that were not cached
    prompt: int  # all its prompt tokens
    output: int  # tokens that it generated


@dataclass(frozen=True)
class Demand:
    """What has arrived in a window that ends now, in intervals of equal length, the oldest first."""

    seconds: float  # of an interval
    requests: Sequence[int]
    tokens: Sequence[float]  # prompt tokens, without those that are found cached
    pairs: Sequence[Pair]  # a sample of requests that ended lately


@dataclass(frozen=True)
class Queues:
    """What waits and runs now. Ages are in seconds, 0 where nothing waits."""

    to_prefill: float  # prompt tokens to compute of requests that wait or are being prefilled
    oldest_prompt: float  # how long the first in the queue has waited since it arrived
    for_credit: int  # requests whose KV waits for room where it is to be decoded
    oldest_credit: float  # how long the first of them has
    decoding: int  # requests that decode


@dataclass(frozen=True)
class StepTimes:
    """What steps of one mesh take, in seconds."""

    prefill: Terms  # of a step, and of each prompt token
    decode: Terms  # of a step, and of each row
    handoff: float  # of the KV of a mean prompt
    is_measured: bool  # prefill and decode both


@dataclass(frozen=True)
class MeshSize:
    """What one mesh holds and runs."""

    chunk: int  # prompt tokens of a step
    prompts: int  # that a step packs
    slots: int  # requests that it holds at once
    tokens: int  # of KV


@dataclass(frozen=True)
class Observations:
    """All that a plan is made of, but for the target."""

    roles: Split  # now
    demand: Demand
    queues: Queues
    times: StepTimes
    size: MeshSize
    is_changing: bool = False  # meshes still drain
    since_change: float | None = None  # seconds since roles changed; None: never


@dataclass(frozen=True)
class Rules:
    """By what a plan is made, and when."""

    interval: float = 5.0  # seconds between two plans
    dwell: float = 20.0  # seconds for which roles stay that were changed
    gain: float = 0.02  # part of all requests that has to meet the target more before roles change
    gain_to_meet: float = 0.005  # likewise where the target is met then and was not before
    headroom: float = 1.1  # a phase that gives up a mesh meets the target at so many times the demand
    fewest: int = 20  # arrivals in the window without which nothing is planned
    bins: int = 128  # intervals of the window
    bin_seconds: float = 0.5
    pairs: int = 256  # in the sample of lengths


RULES = Rules()


@dataclass(frozen=True)
class Outlook:
    """What is predicted of a split: parts of the requests that arrive, 0 to 1."""

    roles: Split
    goodput: float  # meet the whole target
    ttft: float  # meet its ttft_ms
    tpot: float  # meet its tpot_ms


@dataclass(frozen=True)
class Plan:
    """What the roles should be, and why."""

    roles: Split
    reason: Reason
    now: Outlook | None = None  # of the roles now; None: nothing was predicted
    best: Outlook | None = None  # of the split with the highest goodput
    is_reachable: bool = True  # whether some split meets the target

    @property
    def sentence(self) -> str:
        """Say why, for people."""
        return SENTENCES[self.reason]


def plan(observed: Observations, slo: SLO, rules: Rules = RULES) -> Plan:
    """Choose the roles under which most requests are predicted to keep to `slo`, which has a percentile."""
    if sum(observed.demand.requests) < rules.fewest or not observed.demand.pairs:
        return Plan(observed.roles, "few arrivals")
    if not observed.times.is_measured:
        return Plan(observed.roles, "not measured")
    return Plan(observed.roles, "meets")
