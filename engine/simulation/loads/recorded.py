"""The load of an earlier run, from the report or benchmark that it wrote: when each request came, and how long it and
its answer. So what issues by its own clock, as LoadGen and GuideLLM do, is simulated by what it has issued.

Reports hold no prompts: nothing is shared, whatever the run found in its cache. Requests that did not finish are as
long as they got, so their answers may have been meant to be longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...metrics.benchmark_file import read_benchmark
from ...metrics.request_records import RequestRecords
from ..workload import Workload, WorkRequest


@dataclass(frozen=True)
class _Recorded:
    records: RequestRecords

    def __iter__(self) -> Iterator[WorkRequest]:
        """Yield the requests in the order in which they came, times from the first one."""
        arrivals = self.records.column("arrival")
        order = np.lexsort((self.records.column("number"), arrivals))
        columns = (self.records.column(name)[order].tolist() for name in ("prompt_len", "output_len"))
        since = (arrivals[order] - arrivals.min()).tolist()
        for at, prompt, output in zip(since, *columns, strict=True):
            yield WorkRequest(max(1, prompt), max(1, output), at)


def recorded_workload(path: str | Path) -> Workload:
    """Return the workload of a report on file, or of a benchmark of one point.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, one of another version, has several points, or no records.
    """
    points = read_benchmark(path).points
    if len(points) > 1:
        raise ValueError(f"{path} has {len(points)} points, each a load of its own: give a run of one.")
    report, records, _ = points[0].measured
    if records is None or not len(records):
        raise ValueError(f"{path} has no records of its requests: write the report with them.")
    return Workload(f"the requests of {report.run.workload}", _Recorded(records))
