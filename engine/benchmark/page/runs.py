"""The runs that a page shows, and what their loads are called on it.

Names can be long and are written once, in the table of what ran; in figures a run is a letter, where there are two, and
a load its concurrency or its rate, where all loads have one. A run is told apart by colour, dashes and marks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...metrics.benchmark_file import Benchmark, Point
from .numbers import plain

_LONGEST = 28  # characters of a load's name in a figure


class Named(NamedTuple):
    """A benchmark under the name that the page has for it."""

    name: str
    benchmark: Benchmark


class Style(NamedTuple):
    """How a run is drawn."""

    color: str
    dash: str
    symbol: str


# Colours that differ for the colour-blind, and have a contrast of 3 or more on white and on black: after Okabe and Ito.
BLUE, RED, GREEN, PURPLE, OCHRE, GREY = "#1a7fc4", "#d55e00", "#0a9970", "#b8689a", "#b07d00", "#7d7d7d"
STYLES = (
    Style(BLUE, "solid", "circle"), Style(RED, "dash", "square"), Style(GREEN, "dot", "diamond"),
    Style(PURPLE, "dashdot", "cross"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ShownRun:
    """A run and how it is told apart."""

    letter: str  # "" where it is alone
    style: Style
    name: str
    benchmark: Benchmark

    def say(self, sentence: str) -> str:
        """Return a sentence about the run, which it names where there are two."""
        return f"{self.letter}: {sentence}" if self.letter else sentence[:1].upper() + sentence[1:]


@dataclass(frozen=True, eq=False)
class ShownPoint:
    """A load of a run."""

    run: ShownRun
    point: Point
    place: int  # among the run's loads, from 0
    label: str  # on an axis whose title says what it is
    is_only: bool  # no run has another

    @property
    def title(self) -> str:
        """Return its name where no axis says what it is: it needs none where each run has one load."""
        if self.is_only:
            return self.run.letter or "this run"
        return ", ".join(filter(None, (self.run.letter, self.name)))

    @property
    def name(self) -> str:
        """Return the load's name, without the run."""
        return shortened(self.point.name)

    def say(self, sentence: str) -> str:
        """Return a sentence about the load, which it names where a run has several."""
        return self.run.say(sentence) if self.is_only else f"{self.title[:1].upper()}{self.title[1:]}: {sentence}"

    @property
    def came(self) -> float:
        """Return the requests/s that came: as planned in an open loop, as they did in a closed one."""
        report = self.point.measured.report
        if self.point.rate is not None:
            return self.point.rate
        return report.requests / report.wall if report.wall > 0 else 0.0


class Compared:
    """All that a page shows."""

    def __init__(self, named: Sequence[Named]) -> None:
        """Show these.

        Raises:
            ValueError: there are none, or more than can be told apart.
        """
        if not 1 <= len(named) <= len(STYLES):
            raise ValueError(f"{len(named)} runs on one page: give 1 to {len(STYLES)}.")
        letters = "" if len(named) == 1 else "ABCD"
        self.runs = tuple(
            ShownRun(letters[place : place + 1], style, name, benchmark)
            for place, ((name, benchmark), style) in enumerate(zip(named, STYLES, strict=False))
        )

    @cached_property
    def points(self) -> tuple[ShownPoint, ...]:
        """Return the loads of all runs."""
        return tuple(
            ShownPoint(run, point, place, self._label(point), not self.is_sweep)
            for run in self.runs
            for place, point in enumerate(run.benchmark.points)
        )

    @property
    def is_sweep(self) -> bool:
        """Return whether a run has several loads."""
        return any(len(run.benchmark.points) > 1 for run in self.runs)

    @cached_property
    def axis(self) -> str:
        """Return what the labels of loads are: the title of an axis."""
        points = [point for run in self.runs for point in run.benchmark.points]
        if all(point.concurrency is not None for point in points):
            return "users at once"
        return "requests/s" if all(point.rate is not None for point in points) else "load"

    def load_of(self, point: Point) -> float | None:
        """Return the place of a load on that axis; None: it has names alone."""
        values = {"users at once": point.concurrency, "requests/s": point.rate}
        return values.get(self.axis)

    def points_of(self, run: ShownRun) -> list[ShownPoint]:
        """Return the loads of one run."""
        return [shown for shown in self.points if shown.run is run]

    def _label(self, point: Point) -> str:
        load = self.load_of(point)
        return shortened(point.name) if load is None else plain(load) if load % 1 else f"{load:,.0f}"


def shortened(text: str) -> str:
    """Return a name that fits a figure: its middle is left out."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 11]}…{text[-10:]}"
