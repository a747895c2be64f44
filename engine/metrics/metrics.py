"""Timelines to the figures people compare: TTFT, TPOT, ITL, E2E, hand-off, tokens per second.

Definitions: TTFT counts from arrival, queueing included; TPOT = (last token - first token) / (n - 1), n >= 2; ITL are
the raw gaps. It reads no clock.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.cache_report import MissReason
from ..protocol.results import Link, Traffic
from ..protocol.service import SLO
from ..protocol.timeline import Timeline
from .counters import Counters, HostTime
from .distribution import Distribution
from .histograms import Histogram, Observed, Quantity, Seen
from .mesh_figures import MeshFigures

# Percentiles are over this many requests, the latest; an engine that runs for weeks must not grow.
RECENT = 4096


@dataclass(frozen=True)
class Latencies:
    """Mean and percentiles over a set of requests; None where no request had that quantity."""

    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    handoff: Distribution | None

    @classmethod
    def of(cls, timelines: Iterable[Timeline]) -> "Latencies":
        """Compute those of finished requests."""
        lines = list(timelines)

        def known(name: str) -> Distribution | None:
            return Distribution.of(value for line in lines if (value := getattr(line, name)) is not None)

        gaps = [np.diff(np.asarray(line.tokens, np.float64)) for line in lines]
        itl = Distribution.of(np.concatenate(gaps) if gaps else ())
        return cls(known("ttft"), known("tpot"), itl, known("e2e"), known("handoff"))


class Unfinished(NamedTuple):
    """The requests that have not ended, at some time."""

    seen: Sequence[Seen] = ()
    waiting: int = 0  # those of them without a place on a mesh
    oldest: float = 0.0  # seconds since the first of these arrived


@dataclass(frozen=True)
class Metrics:
    """The figures of an engine so far; counts are since start-up."""

    requests: dict[FinishReason, int]  # that have ended, by reason
    running: int  # requests that have not ended
    waiting: int  # those of them without a place on a mesh
    oldest_waiting: float  # seconds since the first of these arrived; 0: none waits
    prompt_tokens: int  # of admitted requests
    cached_tokens: int  # those of them that the prefix cache spared
    missed_tokens: dict[MissReason, int]  # those of them that it did not, by reason
    missed_requests: dict[MissReason, int]  # admitted requests with tokens that were missed for this reason
    generated_tokens: int  # of ended requests
    running_tokens: int  # generated so far by requests that have not ended
    tokens_per_second: float  # generated tokens over the time from first arrival to last finish
    compiles: int  # traces and XLA compilations in this process since all programs were there: the engine adds none
    coming: tuple[str, ...]  # sizes of steps that are still being compiled: steps of these sizes run in larger ones
    preemptions: int  # requests that gave up their KV while they ran
    migrations: int  # requests that moved their KV while they decoded
    flips: int  # changes of the role of a pool's mesh
    retries: int  # starts after a lost mesh or transfer
    conditional_prefills: int  # prompts given to a decode mesh to prefill
    handoffs: int  # transfers between meshes that arrived; a long prompt takes several
    handoff_bytes: int  # KV and state moved
    handoff_seconds: float  # from dispatch to arrival, added up over transfers
    links: dict[tuple[int, int], Link]  # the same by source and destination
    steps: int  # dispatched, on all meshes
    host_seconds: float  # CPU time of the dispatching thread
    with_slo: int  # requests with an SLO that have ended, other than by an abort
    met_slo: int  # those of them that have kept to it
    roles: tuple[str, ...]  # of each mesh now, with what it still drains
    plan: str | None  # what the planner of a pool's roles found last, and why; None: nothing yet, or no planner
    planned_flips: dict[str, int]  # those of `flips` that the planner asked for, by its reason
    meshes: tuple[MeshFigures, ...]  # each mesh now; empty in a simulation
    recent: Sequence[Timeline] = field(repr=False)  # of the latest 4096 requests that finished
    observed: Observed = field(repr=False, compare=False)  # what `histograms` are made of

    @cached_property
    def latencies(self) -> Latencies:
        """Return the latencies of `recent`; computed when it is first asked for."""
        return Latencies.of(self.recent)

    @cached_property
    def histograms(self) -> dict[Quantity, Histogram]:
        """Return histograms of all requests since start-up.

        "ttft", "queue" and "itl" are of every request with a first token, up to now; "tpot", "e2e", "prompt" and
        "output" of those that ran to their end; "handoff" of those whose KV moved. Seconds, or tokens for the lengths.
        """
        return self.observed.histograms()

    @property
    def prefix_hit_rate(self) -> float:
        """Return cached tokens / prompt tokens, 0 to 1; 0 where there are none."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def slo_goodput(self) -> float | None:
        """Return the share, 0 to 1, of ended requests with an SLO that have kept to it; None where none has one."""
        return self.met_slo / self.with_slo if self.with_slo else None

    @property
    def handoff_bandwidth(self) -> float | None:
        """Return bytes per second of a transfer, waiting for its KV included; None before the first."""
        return self.handoff_bytes / self.handoff_seconds if self.handoff_seconds > 0 else None


def _is_met(slo: SLO, timeline: Timeline) -> bool:
    pairs = (slo.ttft_ms, timeline.ttft), (slo.tpot_ms, timeline.tpot)
    return all(most is None or value is None or 1000 * value <= most for most, value in pairs)


class RequestLog:
    """Sums over the requests that have ended, and the latest timelines."""

    def __init__(self) -> None:
        self.reasons: Counter[FinishReason] = Counter()
        self.generated_tokens = 0
        self.with_slo = self.met_slo = 0
        self.recent: deque[Timeline] = deque(maxlen=RECENT)
        self.observed = Observed()
        self._first_arrival: float | None = None
        self._last_finish = 0.0

    def add(
        self,
        timeline: Timeline,
        generated: int,
        reason: FinishReason,
        slo: SLO | None = None,
        prompt_len: int = 0,
    ) -> None:
        """Count one request that has ended after `generated` tokens, with `prompt_len` before them."""
        if slo is not None and reason != "abort":
            self.with_slo += 1
            self.met_slo += reason in ("stop", "length") and _is_met(slo, timeline)
        arrival, finish = timeline.arrival, timeline.finish
        assert finish is not None
        self.reasons[reason] += 1
        self.generated_tokens += generated
        self._first_arrival = arrival if self._first_arrival is None else min(self._first_arrival, arrival)
        self._last_finish = max(self._last_finish, finish)
        has_finished = reason in ("stop", "length")
        if has_finished:
            self.recent.append(timeline)
        self.observed.add(Seen(timeline, len(timeline.tokens), prompt_len, has_finished))

    def snapshot(self) -> "RequestLog":
        """Return a copy that stays as it is."""
        twin = copy(self)
        twin.reasons, twin.recent, twin.observed = self.reasons.copy(), self.recent.copy(), self.observed.snapshot()
        return twin

    def metrics(
        self,
        unfinished: Unfinished,
        compiles: int,
        counters: Counters,
        traffic: Traffic,
        host: HostTime,
        coming: tuple[str, ...] = (),
        roles: Sequence[str] = (),
        plan: str | None = None,
        meshes: Sequence[MeshFigures] = (),
    ) -> Metrics:
        """Return the figures now. `unfinished`: requests that have not ended; `compiles`: since the engine was ready;
        `coming`: sizes of steps that are still being compiled; `roles` and `meshes`: of each mesh; `plan`: the
        planner's latest, in a sentence."""
        seconds = self._last_finish - self._first_arrival if self._first_arrival is not None else 0.0
        return Metrics(
            requests=dict(self.reasons),
            running=len(unfinished.seen),
            waiting=unfinished.waiting,
            oldest_waiting=unfinished.oldest,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            missed_tokens=dict(counters.missed_tokens),
            missed_requests=dict(counters.missed_requests),
            generated_tokens=self.generated_tokens,
            running_tokens=sum([seen.tokens for seen in unfinished.seen]),
            tokens_per_second=self.generated_tokens / seconds if seconds > 0 else 0.0,
            compiles=compiles,
            coming=coming,
            preemptions=counters.preemptions,
            migrations=counters.migrations,
            flips=counters.flips,
            retries=counters.retries,
            conditional_prefills=counters.conditional_prefills,
            handoffs=traffic.transfers,
            handoff_bytes=traffic.bytes,
            handoff_seconds=traffic.seconds,
            links=dict(traffic.links),
            steps=host.steps,
            host_seconds=host.seconds,
            with_slo=self.with_slo,
            met_slo=self.met_slo,
            roles=tuple(roles),
            plan=plan,
            planned_flips=dict(counters.planned_flips),
            meshes=tuple(meshes),
            recent=tuple(self.recent),
            observed=self.observed.snapshot(unfinished.seen),
        )
