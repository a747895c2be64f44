"""What a plan of roles is made of: what came, waits and runs, what steps take, what is predicted. Data only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .line_fit import Terms

_SERVED = 0.2  # what it is worth that a request is served, beside 1 for one that meets the target


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
    """What arrives, as it did since demand has changed last, in intervals of equal length."""

    seconds: float  # of an interval
    requests: Sequence[float]
    tokens: Sequence[float]  # prompt tokens, without those that are found cached
    pairs: Sequence[Pair]  # a sample: their proportions are those of what arrives
    seen: int  # requests that this was read from
    are_lengths_known: bool = True  # whether enough have ended for the pairs to be more than the shortest


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
    is_fused: bool = False  # a mesh that does both computes prompt chunks and decode rows in one step


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
    settling: float | None = None  # seconds that the planner's last change took to the end of its drains; None: unknown
    gains: Mapping[Split, float] = field(default_factory=dict)  # `Plan.gains` of the plan before, under the same roles


@dataclass(frozen=True, order=True)
class Outlook:
    """What is predicted of a split: parts of the requests that arrive, 0 to 1."""

    roles: Split
    goodput: float  # meet the whole target
    ttft: float  # meet its ttft_ms
    tpot: float  # meet its tpot_ms
    served: float  # have begun to decode at the end of the window

    @property
    def value(self) -> float:
        """Return what plans are compared by: the goodput, and where all are late the part that is served at all."""
        return self.goodput + _SERVED * self.served
