"""The figures that the published benchmarks sum a point up by, in their own definitions; from what a run measured.

Each is a number of one point, larger or smaller than another's whatever the preset was: all of them can be had of any
run. Requests that failed are not in latencies, and are in the response rate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..metrics.distribution import Distribution
from ..metrics.report_file import Measured
from ..metrics.request_records import FINISHED


@dataclass(frozen=True)
class Figure:
    """One figure."""

    name: str
    unit: str
    of: Callable[[Measured], float | None]  # None: it is not known


def _system(measured: Measured) -> float | None:
    return measured.report.output_tokens_per_second


def _per_gpu(measured: Measured) -> float | None:
    return measured.report.total_tokens_per_second_per_gpu


def _response_rate(measured: Measured) -> float | None:
    return measured.report.finished / measured.report.requests


def _tokens_a_second(tpot: float | None) -> float | None:
    return 1 / tpot if tpot else None


def _median_speed(measured: Measured) -> float | None:
    """1 / median TPOT, which is the median of the requests' speeds after the first token."""
    tpot = measured.report.tpot
    return None if tpot is None else _tokens_a_second(tpot.p50)


def _speed_p90(measured: Measured) -> float | None:
    tpot = measured.report.tpot
    return None if tpot is None else _tokens_a_second(tpot.p90)


def _normalised_p90(measured: Measured) -> float | None:
    """1 / P90 of a request's E2E over its output tokens."""
    records = measured.records
    if records is None:
        return None
    finished = records.column("reason") < FINISHED
    e2e = (records.column("finish") - records.column("arrival"))[finished]
    found = Distribution.of(e2e / np.maximum(1, records.column("output_len")[finished]))
    return None if found is None else _tokens_a_second(found.p90)


def _ttft_p90(measured: Measured) -> float | None:
    ttft = measured.report.ttft
    return None if ttft is None else 1000 * ttft.p90


def _ttft_median(measured: Measured) -> float | None:
    ttft = measured.report.ttft
    return None if ttft is None else 1000 * ttft.p50


def _e2e_median(measured: Measured) -> float | None:
    e2e = measured.report.e2e
    return None if e2e is None else e2e.p50


def _hit_rate(measured: Measured) -> float | None:
    return measured.report.hit_rate


SYSTEM = Figure("output", "tokens/s", _system)
PER_GPU = Figure("in all, per GPU", "tokens/s", _per_gpu)
RESPONSE_RATE = Figure("responses", "of 1", _response_rate)
MEDIAN_SPEED = Figure("median speed", "tokens/s", _median_speed)
SPEED_P90 = Figure("1 / TPOT P90", "tokens/s", _speed_p90)
NORMALISED_P90 = Figure("1 / P90(E2E/token)", "tokens/s", _normalised_p90)
TTFT_P90 = Figure("TTFT P90", "ms", _ttft_p90)
TTFT_MEDIAN = Figure("TTFT median", "ms", _ttft_median)
E2E_MEDIAN = Figure("E2E median", "s", _e2e_median)
HIT_RATE = Figure("prefix hits", "of 1", _hit_rate)
