"""Benchmarks with everything in them, made of numbers alone: no engine, no simulator."""

import numpy as np
from twinmesh.engine.metrics.benchmark_file import About, Benchmark, Point
from twinmesh.engine.metrics.distribution import Distribution
from twinmesh.engine.metrics.gaps import Gaps
from twinmesh.engine.metrics.load_report import Flip, LoadReport, MeshUse, Power, Run
from twinmesh.engine.metrics.report_file import Measured
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.metrics.series import MeshSeries, Series
from twinmesh.engine.protocol.service import SLO

SLO_ASKED = SLO(ttft_ms=400.0, tpot_ms=30.0, percentile=90.0)
_BEFORE, _AFTER = ("prefill", "decode"), ("both", "decode")


def benchmark(*rates, about=None, **parts):
    """A run with a load of each rate, in requests/s; `parts` as of `measured`."""
    points = tuple(Point(f"rate {rate:g}", measured(rate, **parts), rate=rate) for rate in rates)
    return Benchmark(about or About(when="2026-11-30T06:00:00+00:00"), points)


def measured(rate, *, count=60, samples=40, slo=SLO_ASKED, seed=0, **parts):
    """A run of so many requests, the slower the more come a second; two of them fail."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    ttft, tpot = rng.gamma(2, 0.02 * rate, count), rng.gamma(9, 0.002, count)
    gaps, records = Gaps(), RequestRecords()
    for number, (at, first, step) in enumerate(zip(arrivals.tolist(), ttft.tolist(), tpot.tolist(), strict=True)):
        last = at + first + 9 * step
        gaps.add(step, 9)
        ended = dict(first_token=at + first, last_token=last, finish=last, output_len=10, cached_len=16)
        ended |= dict(queue=0.6 * first, prefill=0.3 * first, host=0.1 * first, handoff=0.002)
        if number % 30 == 7:
            ended = dict(output_len=0, finish=at + first, reason="error")
        records.append(RequestRecord(number=number, arrival=at, prompt_len=100, **ended))
    wall = float(arrivals[-1] - arrivals[0]) + 1.0
    given = dict(
        slo=slo, gaps=gaps,
        meshes=[MeshUse(role="both", gpus=1, busy=wall / 2), MeshUse(role="decode", gpus=3, busy=wall / 3)],
        flips=[Flip(t=wall / 2, mesh=0, before="prefill", after="both", reason="forecast: more decode <soon>")],
        dollars_per_gpu_hour=2.5, power=Power(watts=412.5, basis="board"),
        missed_tokens={"never seen": 4000, "evicted": 500}, late=Distribution.of([0.0001, 0.0002]),
    )  # fmt: skip
    run = Run(source="measured", workload=f"poisson at {rate}", model="m", device="a GPU", gpus=4, topology="pool=2")
    report = LoadReport.of(records, run, **given | parts)
    assert report.wall > 0
    return Measured(report, records, series(wall, samples) if samples else None)


def series(wall, samples):
    """Samples of two meshes, one busy all the time until half of it and the other half of the time throughout."""
    t = np.linspace(0, wall, samples)
    grown = np.arange(samples)
    return Series(
        t=t.tolist(), waiting=(grown % 5).tolist(), oldest=(0.1 * (grown % 5)).tolist(),
        running=(3 + grown % 7).tolist(), prompt_tokens=(100 * grown).tolist(), cached_tokens=(16 * grown).tolist(),
        missed_tokens={"never seen": (84 * grown).tolist()},
        meshes=[
            MeshSeries(
                busy=np.minimum(t, wall / 2).tolist(), kv_used=(grown / samples).tolist(), placed=grown.tolist()
            ),
            MeshSeries(busy=(t / 2).tolist(), kv_used=(grown / samples / 2).tolist(), placed=grown.tolist()),
        ],
        roles=[(0.0, _BEFORE), (wall / 2, _AFTER)],
    )  # fmt: skip
