"""Latencies: the percentiles in figures and against the load, and the whole distributions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...metrics.distribution import Distribution
from ...metrics.load_report import LoadReport
from ...metrics.request_records import FINISHED, RequestRecords
from .drawing import Figure, curve, logarithmic, ramp, shares, thinned
from .facts import lateness, ms, whole
from .numbers import count, duration
from .parts import UNKNOWN, Key, Plot, Row, Section, Table
from .runs import Compared, ShownPoint, ShownRun

_MOST_POINTS = 200  # of a curve
_MOST_CURVES = 10  # of a run
_PERCENTILES = (("p50", "P50", "solid"), ("p90", "P90", "dash"), ("p99", "P99", "dot"))


class Curve(NamedTuple):
    """A distribution: the share of requests that took at most so long."""

    seconds: Sequence[float]  # ascending
    shares: Sequence[float]


def latency(compared: Compared) -> Section:
    """Return percentiles and distributions of TTFT, TPOT, ITL and E2E."""
    chosen = [shown for run in compared.runs for shown in _chosen(compared, run)]
    sentences = [_first_tokens(compared), *filter(None, (lateness(compared),))]
    if any(shown.point.measured.records is None for shown in compared.points):
        sentences.append("A run without its records has percentiles alone, and no curves but that of ITL.")
    if len(chosen) < len(compared.points):
        sentences.append(f"Curves are drawn of {len(chosen)} of {count(len(compared.points), 'load')}.")
    plots = [plot for name in ("TTFT", "TPOT", "ITL", "E2E") if (plot := _distribution(name, chosen)) is not None]
    keys = [key_of(shown) for shown in chosen] if len(compared.points) > 1 else ()
    return Section("latency", "Latency", sentences, plots, [_table(compared)], keys)


def latency_by_load(compared: Compared) -> Section | None:
    """Return percentiles against the load; None: no run has several."""
    points = [shown for shown in compared.points if compared.load_of(shown.point) is not None]
    if not compared.is_sweep or not points:
        return None
    plots = []
    for name in ("TTFT", "TPOT", "E2E"):
        figure, values = Figure(compared.axis), list[float]()
        for run in compared.runs:
            mine = [shown for shown in points if shown.run is run and _of(shown, name) is not None]
            for field, percentile, dash in _PERCENTILES:
                ys = [1000 * getattr(_of(shown, name), field) for shown in mine]
                values += ys
                figure.scatter(
                    [compared.load_of(shown.point) for shown in mine], ys, mode="lines+markers",
                    line={"color": run.style.color, "dash": dash, "width": 2}, marker={"symbol": run.style.symbol},
                    name=" ".join(filter(None, (run.letter, percentile))),
                )  # fmt: skip
        if not values:
            continue
        logarithmic(figure.y, values)
        logarithmic(figure.x, [value for shown in points if (value := compared.load_of(shown.point)) is not None])
        plots.append(Plot(f"{name.lower()}-by-load", name, "ms", figure))
    keys = [Key(run.letter, run.style.color) for run in compared.runs if run.letter]
    keys += [Key(percentile, "currentColor", dash) for _, percentile, dash in _PERCENTILES]
    return Section("by-load", "Latency against load", [_growth(compared)], plots, keys=keys)


def _of(shown: ShownPoint, name: str) -> Distribution | None:
    distribution: Distribution | None = getattr(shown.point.measured.report, name.lower())
    return distribution


def _first_tokens(compared: Compared) -> str:
    parts = []
    for run in compared.runs:
        known = [shown for shown in compared.points_of(run) if shown.point.measured.report.ttft is not None]
        if not known:
            continue
        last = max(known, key=lambda shown: shown.came)
        ttft = last.point.measured.report.ttft
        assert ttft is not None
        text = (
            f"half of the first tokens came within {duration(ttft.p50)}, nine in ten within {duration(ttft.p90)} and "
            f"99 in 100 within {duration(ttft.p99)}."
        )
        parts.append(last.say(text))
    if not parts:
        return "No request finished, so there are no latencies."
    return f"{'Under the heaviest load, ' if compared.is_sweep else ''}{' '.join(parts)}"


def _growth(compared: Compared) -> str:
    texts = []
    for run in compared.runs:
        known = [one for one in compared.points_of(run) if one.point.measured.report.ttft is not None]
        if len(known) < 2:
            continue
        low, high = min(known, key=lambda one: one.came), max(known, key=lambda one: one.came)
        before, after = (one.point.measured.report.ttft.p99 for one in (low, high))  # type: ignore[union-attr]
        rise = f"from {duration(before)} to {duration(after)}"
        texts.append(run.say(f"from {low.name} to {high.name} the P99 of TTFT goes {rise}."))
    return " ".join(texts) or "No two loads have latencies to compare."


def _table(compared: Compared) -> Table:
    rows: list[Row] = []
    for shown in compared.points:
        for name in ("TTFT", "TPOT", "ITL", "E2E"):
            found = _of(shown, name)
            cells = (
                [UNKNOWN] * 5
                if found is None
                else [whole(found.count), ms(found.mean), ms(found.p50), ms(found.p90), ms(found.p99)]
            )
            rows.append((f"{shown.title}: {name}", cells))
    return Table("latency", ("ms", "values", "mean", "P50", "P90", "P99"), rows)


def _chosen(compared: Compared, run: ShownRun) -> list[ShownPoint]:
    points = compared.points_of(run)
    return [points[place] for place in thinned(len(points), _MOST_CURVES)]


def key_of(shown: ShownPoint) -> Key:
    """Return how the curve of a load is drawn: alone in its run's colour, else by its place among the run's loads."""
    loads = len(shown.run.benchmark.points)
    color = shown.run.style.color if loads == 1 else ramp(shown.place, loads)
    return Key(shown.title, color, shown.run.style.dash)


def _distribution(name: str, chosen: Sequence[ShownPoint]) -> Plot | None:
    figure, values = Figure("ms"), list[float]()
    for shown in chosen:
        found = curve_of(shown, name)
        if found is None:
            continue
        key = key_of(shown)
        places = thinned(len(found.seconds), _MOST_POINTS)
        xs = [1000 * found.seconds[place] for place in places]
        values += xs
        figure.scatter(
            curve(xs), curve([found.shares[place] for place in places]), name=shown.title, mode="lines",
            line={"color": key.color, "dash": key.dash, "width": 2, "shape": "hv"},
        )  # fmt: skip
    if not values:
        return None
    logarithmic(figure.x, values)
    shares(figure.y)
    figure.y["tickvals"] = [0, 0.25, 0.5, 0.75, 0.9, 1]
    return Plot(f"{name.lower()}-cdf", name, f"share of {'gaps' if name == 'ITL' else 'requests'} within", figure)


def curve_of(shown: ShownPoint, name: str) -> Curve | None:
    """Return the distribution of a latency by its name; None: it is not known."""
    report, records = shown.point.measured.report, shown.point.measured.records
    if name == "ITL":
        return _gaps(report)
    if records is None:
        return None
    values = np.sort(_latencies(records, name))
    if not len(values):
        return None
    return Curve(values.tolist(), (np.arange(1, len(values) + 1) / len(values)).tolist())


def _gaps(report: LoadReport) -> Curve | None:
    if not report.itl_counts:
        return None
    seconds, counts = zip(*report.itl_counts, strict=True)
    ends = np.cumsum(counts)
    return Curve(list(seconds), (ends / ends[-1]).tolist())


def _latencies(records: RequestRecords, name: str) -> np.ndarray:
    """Return the seconds [n] that finished requests took, unsorted; those without are left out."""
    first, last = records.column("first_token"), records.column("last_token")
    arrival, output = records.column("arrival"), records.column("output_len")
    seconds = {
        "TTFT": first - arrival,
        "TPOT": np.where(output > 1, last - first, np.nan) / np.maximum(output - 1, 1),
        "E2E": records.column("finish") - arrival,
    }[name]
    chosen: np.ndarray = seconds[(records.column("reason") < FINISHED) & ~np.isnan(seconds)]
    return chosen
