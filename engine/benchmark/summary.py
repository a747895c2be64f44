"""A preset's points as a table of text: the figures that the benchmark which it is shaped like sums a point up by."""

from collections.abc import Mapping, Sequence

from ..metrics.benchmark_file import Benchmark, Point
from .published import Figure


def table(benchmarks: Mapping[str, Benchmark], figures: Sequence[Figure]) -> str:
    """Return a row for each point of each benchmark under its name, points of the same place below each other, with
    units below the names of figures; lines ended by a line feed."""
    asked = any(point.accuracy is not None for one in benchmarks.values() for point in one.points)
    heads = [figure.name for figure in figures] + ["right"] * asked
    units = [figure.unit for figure in figures] + ["of asked"] * asked
    longest = max(len(one.points) for one in benchmarks.values())
    rows = [
        (point.name, name, _cells(point, figures, asked))
        for place in range(longest)
        for name, one in benchmarks.items()
        if place < len(one.points)
        for point in (one.points[place],)
    ]
    first = max(len(point) for point, _, _ in rows)
    second = max(len(name) for _, name, _ in rows)
    lines = [("", "", heads), ("", "", units), *rows]
    widths = [max(len(cells[column]) for _, _, cells in lines) for column in range(len(heads))]
    return "".join(
        f"{point:{first}}  {name:{second}}  {_joined(cells, widths)}".rstrip() + "\n" for point, name, cells in lines
    )


def _cells(point: Point, figures: Sequence[Figure], asked: bool) -> list[str]:
    values = [figure.of(point.measured) for figure in figures]
    cells = ["-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values]
    if asked:
        scored = point.accuracy
        cells.append("-" if scored is None else f"{scored.right}/{scored.asked}")
    return cells


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
