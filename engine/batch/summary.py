"""What a batch run has done: counts, tokens, latencies, and what they cost. No JAX here."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..api.outputs import RequestOutput
from ..metrics.metrics import RECENT, Latencies
from ..protocol.timeline import Timeline
from .request_lines import BatchRequest


@dataclass
class BatchResult:
    """The outcome of a run so far: counts of lines, earlier starts included, and tokens and times of this start."""

    succeeded: int = 0  # output lines with a result
    failed: int = 0  # output lines with an error
    resumed: int = 0  # of both, those that earlier starts wrote
    mended: int = 0  # damaged lines that were taken out of the output
    retried: int = 0  # lines with an error that were taken out of the output, to be run again
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the prefix cache spared
    completion_tokens: int = 0
    promoted: int = 0  # lines that ran as interactive requests, because the run was going to be late
    predicted_late: float | None = None  # seconds, as was said; None: nothing was said
    late: float = 0.0  # seconds after the deadline when this start ended; 0 without one
    seconds: float = 0.0  # wall time, without loading the model
    timelines: deque[Timeline] = field(default_factory=lambda: deque(maxlen=RECENT))  # of the latest 4096 successes
    kept: list[tuple[BatchRequest, RequestOutput]] = field(default_factory=list)  # the first ones, in input order

    @property
    def finished(self) -> int:
        """Return the number of output lines written, by this start and earlier ones."""
        return self.succeeded + self.failed

    @property
    def tokens_per_second(self) -> float:
        """Return generated tokens per second of wall time."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Return cached tokens / prompt tokens, 0 to 1; 0 if there are none."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, request: BatchRequest, output: RequestOutput, keep: int) -> None:
        """Count a request that was answered; `keep`: how many of the first, in input order, to keep whole."""
        self.succeeded += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens or 0
        self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self.timelines.append(output.timeline)
        if keep:
            self.kept = sorted([*self.kept, (request, output)], key=lambda kept: kept[0].line)[:keep]

    def summary(self, *, devices: int, device_hour_price: float | None = None) -> dict[str, Any]:
        """Return the figures as plain values, for JSON. Latencies in seconds; None where no request has any.

        Args:
            devices: the number of devices that the engine ran on, those for prefill included.
            device_hour_price: dollars for one device for an hour. Costs are for `seconds` only: a model that takes
                minutes to load costs more.
        """
        latencies = Latencies.of(self.timelines)
        figures: dict[str, Any] = {
            "results": self.finished,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "resumed": self.resumed,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prefix_hit_rate": self.prefix_hit_rate,
            "completion_tokens": self.completion_tokens,
            "promoted": self.promoted,
            "seconds_late": self.late,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "devices": devices,
        }
        for name in ("ttft", "tpot", "itl", "e2e", "handoff"):
            percentiles = getattr(latencies, name)
            figures[name] = msgspec.to_builtins(percentiles)
        return figures | self._costs(devices, device_hour_price)

    def _costs(self, devices: int, price: float | None) -> dict[str, float | None]:
        dollars = None if price is None else price * devices * self.seconds / 3600

        def per_million(tokens: int) -> float | None:
            return dollars / tokens * 1e6 if dollars is not None and tokens else None

        return {
            "device_hour_price": price,
            "dollars": dollars,
            "dollars_per_million_tokens": per_million(self.prompt_tokens + self.completion_tokens),
            "dollars_per_million_completion_tokens": per_million(self.completion_tokens),
        }
