"""Timelines to the figures people compare: TTFT, TPOT, ITL, E2E, hand-off, tokens per second.

Definitions: TTFT counts from arrival, queueing included; TPOT = (last token - first token) / (n - 1), n >= 2; ITL are
the raw gaps. Percentiles are linear between the two nearest ranks. Control-plane module: no JAX, no clock here.
"""

from collections import Counter, deque
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.timeline import Timeline
from ..scheduler.request import Request
from .counters import Counters, HostTime, Traffic

# Percentiles are over this many requests, the latest; an engine that runs for weeks must not grow.
RECENT = 4096


@dataclass(frozen=True)
class Percentiles:
    """Of one quantity, in seconds; `count` values went in."""

    count: int
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles | None":
        """None where there are no values."""
        data = list(values)
        if not data:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(data, (50, 90, 99)))
        return cls(len(data), p50, p90, p99)


@dataclass(frozen=True)
class Latencies:
    """Percentiles over a set of requests; None where no request had that quantity."""

    ttft: Percentiles | None
    tpot: Percentiles | None
    itl: Percentiles | None
    e2e: Percentiles | None
    handoff: Percentiles | None

    @classmethod
    def of(cls, timelines: Iterable[Timeline]) -> "Latencies":
        """Summarise finished requests."""
        lines = list(timelines)

        def known(name: str) -> Percentiles | None:
            return Percentiles.of(value for line in lines if (value := getattr(line, name)) is not None)

        itl = Percentiles.of(gap for line in lines for gap in line.itl)
        return cls(known("ttft"), known("tpot"), itl, known("e2e"), known("handoff"))


@dataclass(frozen=True)
class Metrics:
    """An engine so far. Counts are since start-up; `latencies` are of the latest 4096 requests that finished.

    `requests` counts ended requests by finish reason; `running` have not ended. `prompt_tokens` are of admitted
    requests, `cached_tokens` those of them that the prefix cache spared; `generated_tokens` are of ended requests.
    `tokens_per_second`: generated tokens over the time from first arrival to last finish. `compiles` counts traces and
    XLA compilations in this process since the engine was ready, by anyone: an engine adds none. `preemptions` and
    `migrations`: requests that gave up or moved their KV while they ran. `retries`: starts after a lost mesh or
    transfer. `handoffs`: transfers between meshes that arrived; a long prompt takes several. `handoff_bytes`: KV and
    state moved. `handoff_seconds`: from dispatch to arrival, added up over transfers. `steps`: dispatched, on all
    meshes; `host_seconds`: CPU time of the dispatching thread.
    """

    requests: dict[FinishReason, int]
    running: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float
    compiles: int
    preemptions: int
    migrations: int
    retries: int
    handoffs: int
    handoff_bytes: int
    handoff_seconds: float
    steps: int
    host_seconds: float
    latencies: Latencies

    @property
    def prefix_hit_rate(self) -> float:
        """Cached tokens / prompt tokens, 0 to 1; 0 where there are none."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def handoff_bandwidth(self) -> float | None:
        """Bytes per second of one transfer, waiting for its KV to be computed included; None before the first."""
        return self.handoff_bytes / self.handoff_seconds if self.handoff_seconds > 0 else None


class RequestLog:
    """Sums over requests as they end, and the latest timelines."""

    def __init__(self) -> None:
        self.reasons: Counter[FinishReason] = Counter()
        self.generated_tokens = 0
        self.recent: deque[Timeline] = deque(maxlen=RECENT)
        self._first_arrival: float | None = None
        self._last_finish = 0.0

    def add(self, request: Request, reason: FinishReason) -> None:
        """Count one request that has ended."""
        line = request.timeline
        assert line.finish is not None
        self.reasons[reason] += 1
        self.generated_tokens += request.confirmed
        self._first_arrival = line.arrival if self._first_arrival is None else min(self._first_arrival, line.arrival)
        self._last_finish = max(self._last_finish, line.finish)
        if reason in ("stop", "length"):
            self.recent.append(line)

    def snapshot(self) -> "RequestLog":
        """A copy that stays as it is."""
        twin = copy(self)
        twin.reasons, twin.recent = self.reasons.copy(), self.recent.copy()
        return twin

    def metrics(self, running: int, compiles: int, tally: Counters, traffic: Traffic, host: HostTime) -> Metrics:
        """The figures now. `running`: requests that have not ended; `compiles`: since the engine was ready."""
        seconds = self._last_finish - self._first_arrival if self._first_arrival is not None else 0.0
        return Metrics(
            requests=dict(self.reasons),
            running=running,
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            generated_tokens=self.generated_tokens,
            tokens_per_second=self.generated_tokens / seconds if seconds > 0 else 0.0,
            compiles=compiles,
            preemptions=tally.preemptions,
            migrations=tally.migrations,
            retries=tally.retries,
            handoffs=traffic.transfers,
            handoff_bytes=traffic.bytes,
            handoff_seconds=traffic.seconds,
            steps=host.steps,
            host_seconds=host.seconds,
            latencies=Latencies.of(self.recent),
        )
