"""What became of each request of a run, in numbers, and a table of a million of them.

`RequestRecord` is one request, as it is put in and read out; `RequestRecords` holds many in columns, about 100 bytes a
request. Times are in seconds on one clock, the engine's or a virtual one; only differences of them mean anything. Sums
and percentiles over records are in `load_report.py`.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import astuple

from ..protocol.service import SLO

# Ends of a request: the engine's own (`FinishReason`), and "refused" for one that was turned away on arrival.
Reason = Literal["stop", "length", "abort", "error", "deadline", "refused"]
REASONS: tuple[Reason, ...] = ("stop", "length", "abort", "error", "deadline", "refused")
FINISHED = 2  # the first so many reasons are of requests that ran to their end; all others are misses


class TtftParts(NamedTuple):
    """A time to first token, divided; seconds that add up to it."""

    queue: float = 0.0
    prefill: float = 0.0
    host: float = 0.0


def divide_ttft(arrival: float, taken_in: float, prefill_start: float | None, first_token: float | None) -> TtftParts:
    """Divide a time to first token; `taken_in` is when the dispatching thread had the request. Nothing without a first
    token."""
    if first_token is None or prefill_start is None:
        return TtftParts()
    # A start is stamped with the time of the event that it follows from, which may be before the request was taken in.
    queue = max(0.0, prefill_start - taken_in)
    host = min(first_token - arrival - queue, max(0.0, taken_in - arrival))
    return TtftParts(queue, first_token - arrival - queue - host, host)


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
    host: float = 0.0  # of its time to first token, until it was taken in: tokenising, and what the thread did before
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


# Column -> type code of `array`, in the order of the record's fields. Times that are None are NaN.
_COLUMNS = {
    "number": "q", "arrival": "d", "prompt_len": "l", "output_len": "l", "cached_len": "l", "first_token": "d",
    "last_token": "d", "finish": "d", "queue": "d", "prefill": "d", "handoff": "d", "host": "d", "reason": "b",
}  # fmt: skip
_TIMES = ("first_token", "last_token", "finish")  # that may be None
_PLACES = {reason: place for place, reason in enumerate(REASONS)}


class RequestRecords:
    """Records in columns, in the order in which they were added."""

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        """Hold these records."""
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._appends = [column.append for column in self._columns.values()]
        self._slos: dict[int, SLO] = {}  # place -> its own, for those that have one
        for record in records:
            self.append(record)

    @classmethod
    def of_columns(cls, columns: Mapping[str, Sequence[Any]], slos: Mapping[int, SLO]) -> "RequestRecords":
        """Hold records whose columns are given by the names of `column`, and SLOs by place.

        Raises:
            ValueError: a column is missing, or of another length, or holds what it cannot.
        """
        table = cls()
        for name, column in table._columns.items():
            values = columns.get(name)
            if values is None:
                raise ValueError(f"there is no column {name} of records.")
            try:
                column.extend([nan if value is None else value for value in values])
            except (TypeError, OverflowError):
                raise ValueError(f"the column {name} of records holds what is no number for it.") from None
        count = len(table)
        if any(len(column) != count for column in table._columns.values()):
            raise ValueError("the columns of records are not equally long.")
        if not all(0 <= place < len(REASONS) for place in table._columns["reason"]):
            raise ValueError(f"the column reason of records holds places of {', '.join(REASONS)}, from 0.")
        if not all(0 <= place < count for place in slos):
            raise ValueError("there are SLOs of records that are not there.")
        table._slos.update(slos)
        return table

    def append(self, record: RequestRecord) -> None:
        """Add a record."""
        if record.slo is not None:
            self._slos[len(self)] = record.slo
        *values, reason, _ = astuple(record)
        for append, value in zip(self._appends, values, strict=False):  # `reason` comes last
            append(nan if value is None else value)
        self._appends[-1](_PLACES[reason])

    def __len__(self) -> int:
        """Return how many records there are."""
        return len(self._columns["number"])

    def __iter__(self) -> Iterator[RequestRecord]:
        """Yield the records."""
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> RequestRecord:
        """Return the record that was added at this place, from 0."""
        values: dict[str, Any] = {name: column[place] for name, column in self._columns.items()}
        for name in _TIMES:
            values[name] = None if isnan(values[name]) else values[name]
        values["reason"] = REASONS[values["reason"]]
        return RequestRecord(**values, slo=self._slos.get(place % len(self)))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return tuple(self._columns)

    def column(self, name: str) -> np.ndarray:
        """Return one column [records] by the name of the record's field: times that are None are NaN, reasons are their
        places in `REASONS`. A copy."""
        return np.array(self._columns[name])

    def slos(self) -> dict[int, SLO]:
        """Return the SLOs of those that have one of their own, by place."""
        return dict(self._slos)
