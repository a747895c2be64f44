"""The page's figures, a function each: from benchmarks to a plotly figure, or None where they have nothing to show.

Every figure takes all benchmarks that are compared, and names them in its legend. Numbers are those of the JSON: values
go in as lists, as plotly would pack arrays, and SVG is drawn, never WebGL, of which browsers without a GPU complain.
Units are in axis titles: ms, tokens/s, $.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...extras import need
from ...metrics.benchmark_file import Benchmark
from ...metrics.request_records import FINISHED, RequestRecords

_MOST = 2000  # points of a curve


class Named(NamedTuple):
    """A benchmark under the name that the page has for it."""

    name: str
    benchmark: Benchmark


type Figure = Any  # plotly.graph_objects.Figure, which has no types
type Draw = Callable[[Sequence[Named]], Figure | None]


def ttft_cdf(compared: Sequence[Named]) -> Figure | None:
    """Draw the distribution of the time to first token, a curve a point."""
    figure = _figure("ms", "share of requests")
    for label, records in _points(compared):
        finished = records.column("reason") < FINISHED
        values = 1000 * np.sort((records.column("first_token") - records.column("arrival"))[finished])
        shares = np.arange(1, len(values) + 1) / max(1, len(values))
        step = -(-max(1, len(values)) // _MOST)
        figure.add_scatter(x=values[::step].tolist(), y=shares[::step].tolist(), name=label, line_shape="hv")
    return figure if figure.data else None


def _points(compared: Sequence[Named]) -> list[tuple[str, RequestRecords]]:
    """Return the points that have records, named."""
    return [
        (f"{name}, {point.name}", point.measured.records)
        for name, benchmark in compared
        for point in benchmark.points
        if point.measured.records is not None
    ]


def _figure(x: str, y: str) -> Figure:
    figure = need("plotly.graph_objects", "report", "An HTML page").Figure()
    figure.update_layout(xaxis_title=x, yaxis_title=y, margin={"l": 56, "r": 8, "t": 8, "b": 48}, hovermode="closest")
    return figure


FIGURES: Mapping[str, Draw] = {"Time to first token": ttft_cdf}
