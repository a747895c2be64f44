"""What became of each request of a run, in numbers, and a table of a million of them.

`RequestRecord` is one request, as it is put in and read out; `RequestRecords` holds many in columns, about 100 bytes a
request. Times are in seconds on one clock, the engine's or a virtual one; only differences of them mean anything. Sums
and percentiles over records are in `load_report.py`.
"""

from array import array
from collections.abc import Iterable, Iterator
from math import isnan, nan
from typing import Any, Literal

import msgspec
import numpy as np

from ..protocol.service import SLO

# Ends of a request: the engine's own (`FinishReason`), and "refused" for one that was turned away on arrival.
Reason = Literal["stop", "length", "abort", "error", "deadline", "refused"]
REASONS: tuple[Reason, ...] = ("stop", "length", "abort", "error", "deadline", "refused")
FINISHED = 2  # the first so many reasons are of requests that ran to their end; all others are misses


class RequestRecord(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One request that has ended. `queue`, `prefill` and `host` add up to its time to first token."""

    number: int  # its place in the workload
    arrival: float
    prompt_len: int  # tokens
    output_len: int  # tokens that it generated; 0: it ended before the first
    cached_len: int = 0  # prompt tokens that the prefix cache spared
    first_token: float | None = None  # when it was read; None: there was none
    last_token: float | None = None
    finish: float | None = None  # when it ended; None: it was refused
    queue: float = 0.0  # from arrival until its first chunk was dispatched
    prefill: float = 0.0  # from then to the first token, but for `host`
    handoff: float = 0.0  # from the first token until its KV was where it decodes: after TTFT, and in E2E
    host: float = 0.0  # of its time to first token, what the host took: tokenising, dispatching, reading
    reason: Reason = "length"
    slo: SLO | None = None  # its own; None: that of the report

    @property
    def ttft(self) -> float | None:
        """Return the time to first token: from arrival to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """Return the time per output token after the first: (last - first) / (n - 1), for n >= 2 tokens."""
        if self.first_token is None or self.last_token is None or self.output_len < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_len - 1)

    @property
    def e2e(self) -> float | None:
        """Return the end-to-end time: from arrival to finish."""
        return None if self.finish is None else self.finish - self.arrival


# Column -> type code of `array`. Times that are None are NaN; `reason` is its place in `REASONS`.
_COLUMNS = {
    "number": "q", "arrival": "d", "prompt_len": "l", "output_len": "l", "cached_len": "l", "first_token": "d",
    "last_token": "d", "finish": "d", "queue": "d", "prefill": "d", "handoff": "d", "host": "d", "reason": "b",
}  # fmt: skip


class RequestRecords:
    """Records in columns, in the order in which they were added."""

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        """Hold these records."""
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._slos: dict[int, SLO] = {}  # place -> its own, for those that have one
        for record in records:
            self.append(record)

    def append(self, record: RequestRecord) -> None:
        """Add a record."""
        if record.slo is not None:
            self._slos[len(self)] = record.slo
        for name, column in self._columns.items():
            value = getattr(record, name)
            column.append(REASONS.index(value) if name == "reason" else nan if value is None else value)

    def __len__(self) -> int:
        """Return how many records there are."""
        return len(self._columns["number"])

    def __iter__(self) -> Iterator[RequestRecord]:
        """Yield the records."""
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> RequestRecord:
        """Return the record that was added at this place, from 0."""
        values: dict[str, Any] = {name: column[place] for name, column in self._columns.items()}
        for name in ("first_token", "last_token", "finish"):
            values[name] = None if isnan(values[name]) else values[name]
        values["reason"] = REASONS[values["reason"]]
        return RequestRecord(**values, slo=self._slos.get(place % len(self)))

    def column(self, name: str) -> np.ndarray:
        """Return one column [records] by the name of the record's field: times that are None are NaN, reasons are their
        places in `REASONS`. A copy."""
        return np.array(self._columns[name])

    def slos(self) -> dict[int, SLO]:
        """Return the SLOs of those that have one of their own, by place."""
        return dict(self._slos)
