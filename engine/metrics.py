"""Timelines to the figures people compare: TTFT, TPOT, ITL, E2E, hand-off, tokens per second.

Definitions: TTFT counts from arrival, queueing included; TPOT = (last token - first token) / (n - 1), n >= 2; ITL are
the raw gaps. Percentiles are linear between the two nearest ranks. Control-plane module: no JAX, no clock here.
"""

from collections import Counter, deque
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import numpy as np

from .protocol import FinishReason
from .request import Request, Timeline

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

    `requests` counts ended requests by finish reason; `running` have not ended. `compiles` counts traces and XLA
    compilations in this process since the engine was ready, by anyone: an engine adds none. `handoff_bytes`: KV and
    state moved. `tokens_per_second`: generated tokens over the time from first arrival to last finish.
    """

    requests: dict[FinishReason, int]
    running: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    compiles: int
    handoff_bytes: int
    latencies: Latencies


class RequestLog:
    """Sums over requests as they end, and the latest timelines."""

    def __init__(self) -> None:
        """Nothing ended yet."""
        self.reasons: Counter[FinishReason] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.recent: deque[Timeline] = deque(maxlen=RECENT)
        self._first_arrival: float | None = None
        self._last_finish = 0.0

    def add(self, request: Request, reason: FinishReason) -> None:
        """Count one request that has ended."""
        line = request.timeline
        assert line.finish is not None
        self.reasons[reason] += 1
        self.prompt_tokens += request.prompt_len
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

    def metrics(self, running: int, compiles: int, handoff_bytes: int) -> Metrics:
        """The figures now."""
        seconds = self._last_finish - self._first_arrival if self._first_arrival is not None else 0.0
        return Metrics(
            requests=dict(self.reasons),
            running=running,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            tokens_per_second=self.generated_tokens / seconds if seconds > 0 else 0.0,
            compiles=compiles,
            handoff_bytes=handoff_bytes,
            latencies=Latencies.of(self.recent),
        )
