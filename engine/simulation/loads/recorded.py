"""The load of an earlier run, from the report that it wrote: when each request came, and how long it and its answer.

Reports hold no prompts: nothing is shared, whatever the run found in its cache. Requests that did not finish are as
long as they got, so their answers may have been meant to be longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...metrics.report_file import read_report
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
    """Return the workload of a report on file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no report, one of another version, or has no records.
    """
    report, records, _ = read_report(path)
    if records is None or not len(records):
        raise ValueError(f"{path} has no records of its requests: write the report with them.")
    return Workload(f"the requests of {report.run.workload}", _Recorded(records))
