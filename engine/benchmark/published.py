"""The figures that the published benchmarks sum a point up by, in their own definitions; from what a run measured.

Each is a number of one point, larger or smaller than another's whatever the preset was: all of them can be had of any
run. Requests that failed are not in latencies, and are in the response rate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..metrics.distribution import Distribution, percentile
from ..metrics.load_report import LoadReport
from ..metrics.report_file import Measured
from ..metrics.request_records import FINISHED


@dataclass(frozen=True)
class Figure:
    """One figure."""

    name: str
    unit: str
    of: Callable[[Measured], float | None]  # None: it is not known


def interactivity(report: LoadReport) -> float | None:
    """Return the tokens/s that a user in the middle sees once his answer flows: 1 / P50 of TPOT, as InferenceX has it;
    None: no answer had two tokens."""
    return _inverse(percentile(report.tpot, 50))


def slow_interactivity(report: LoadReport) -> float | None:
    """Return the tokens/s that nine in ten users have at least: 1 / P90 of TPOT, as MLPerf Endpoints has it."""
    return _inverse(percentile(report.tpot, 90))


def _normalised_p90(measured: Measured) -> float | None:
    """1 / P90 of a request's E2E over its output tokens."""
    records = measured.records
    if records is None:
        return None
    finished = records.column("reason") < FINISHED
    e2e = (records.column("finish") - records.column("arrival"))[finished]
    return _inverse(percentile(Distribution.of(e2e / np.maximum(1, records.column("output_len")[finished])), 90))


def _inverse(seconds: float | None) -> float | None:
    return 1 / seconds if seconds else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


SYSTEM = Figure("output", "tokens/s", lambda it: it.report.output_tokens_per_second)
PER_GPU = Figure("in all, per GPU", "tokens/s", lambda it: it.report.total_tokens_per_second_per_gpu)
RESPONSE_RATE = Figure("responses", "share", lambda it: it.report.finished / it.report.requests)
MEDIAN_SPEED = Figure("median speed", "tokens/s", lambda it: interactivity(it.report))
SPEED_P90 = Figure("1 / TPOT P90", "tokens/s", lambda it: slow_interactivity(it.report))
NORMALISED_P90 = Figure("1 / P90(E2E/token)", "tokens/s", _normalised_p90)
TTFT_P90 = Figure("TTFT P90", "ms", lambda it: _ms(percentile(it.report.ttft, 90)))
TTFT_MEDIAN = Figure("TTFT median", "ms", lambda it: _ms(percentile(it.report.ttft, 50)))
E2E_MEDIAN = Figure("E2E median", "s", lambda it: percentile(it.report.e2e, 50))
HIT_RATE = Figure("prefix hits", "share", lambda it: it.report.hit_rate)
