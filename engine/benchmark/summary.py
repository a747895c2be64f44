"""A preset's points as a table of text: the figures that the benchmark which it is shaped like sums a point up by."""

from collections.abc import Mapping, Sequence

from ..metrics.benchmark_file import Benchmark, Point
from .published import Figure


def table(benchmarks: Mapping[str, Benchmark], figures: Sequence[Figure]) -> str:
    """Return a row for each point of each benchmark under its name, points of the same place below each other; lines
    ended by a line feed. At most 100 columns wide with five figures."""
    asked = any(point.accuracy is not None for one in benchmarks.values() for point in one.points)
    heads = [f"{figure.name}, {figure.unit}" for figure in figures] + ["right"] * asked
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
    widths = [max(len(head), *(len(row[column]) for _, _, row in rows)) for column, head in enumerate(heads)]
    lines = [f"{'':{first}}  {'':{second}}  {_joined(heads, widths)}"]
    lines += [f"{point:{first}}  {name:{second}}  {_joined(cells, widths)}" for point, name, cells in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _cells(point: Point, figures: Sequence[Figure], asked: bool) -> list[str]:
    values = [figure.of(point.measured) for figure in figures]
    cells = ["-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values]
    if asked:
        scored = point.accuracy
        cells.append("-" if scored is None else f"{scored.right}/{scored.asked}")
    return cells


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
