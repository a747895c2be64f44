"""What a GPU gives against what a user gets: throughput over interactivity, and the points that no other beats.

Interactivity is the tokens/s that one user sees once his answer flows, by the P50 of TPOT; by its P90 where a preset is
shaped like MLPerf Endpoints. Throughput per GPU divides by all GPUs.
"""

from collections.abc import Callable, Sequence

from ...metrics.distribution import percentile
from ...metrics.load_report import LoadReport
from ..published import interactivity, slow_interactivity
from .drawing import Figure
from .facts import ms, number, share, whole
from .numbers import plain
from .parts import Key, Plot, Row, Section, Table
from .runs import Compared, ShownPoint, ShownRun

ENDPOINTS = "endpoints"  # the preset

type Value = Callable[[LoadReport], float | None]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats, or equals, in both values at once, ascending by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def throughput(compared: Compared) -> Section:
    """Return throughput per GPU over interactivity, with each run's frontier."""
    known = [shown for shown in compared.points if interactivity(shown.point.measured.report) is not None]
    heading = "Throughput against interactivity"
    if not known:
        return Section("throughput", heading, ["No answer had two tokens, so nothing tells how fast tokens followed."])
    said = [
        "To the right each user is served faster, upwards a GPU serves more; the line joins the loads that no other "
        "load of the run beats in both."
    ]
    plots, keys = [], list[Key]()
    if len(known) > 1:
        plots = [
            _plot("output", "Output tokens", known, interactivity, lambda one: one.output_tokens_per_second_per_gpu),
            _plot("total", "All tokens", known, interactivity, lambda one: one.total_tokens_per_second_per_gpu),
        ]
        keys = [Key(run.letter, run.style.color, run.style.dash) for run in compared.runs if run.letter]
    else:
        said = ["One load gives one point, and no frontier: run a sweep for one."]
    return Section("throughput", heading, [*said, *_ends(compared, known)], plots, [_table(known)], keys)


def _ends(compared: Compared, known: Sequence[ShownPoint]) -> list[str]:
    said = []
    for run in compared.runs:
        mine = [shown.point.measured.report for shown in known if shown.run is run]
        if len(mine) < 2:
            continue
        most = max(mine, key=lambda report: report.output_tokens_per_second_per_gpu)
        quickest = max(mine, key=lambda report: interactivity(report) or 0.0)
        text = (
            f"a GPU gives at most {plain(most.output_tokens_per_second_per_gpu)} output tokens/s, with "
            f"{plain(interactivity(most) or 0.0)} tokens/s for a user; the quickest load gives a user "
            f"{plain(interactivity(quickest) or 0.0)}, and a GPU {plain(quickest.output_tokens_per_second_per_gpu)}."
        )
        said.append(run.say(text))
    return said


def _plot(
    name: str, title: str, known: Sequence[ShownPoint], across: Value, up: Value, unit: str = "tokens/s a GPU"
) -> Plot:
    figure = Figure("tokens/s a user", height=320)
    for run in dict.fromkeys(shown.run for shown in known):
        mine = [shown for shown in known if shown.run is run]
        _add_run(figure, run, mine, across, up)
    figure.x["rangemode"] = figure.y["rangemode"] = "tozero"
    return Plot(f"throughput-{name}", title, unit, figure)


def _add_run(figure: Figure, run: ShownRun, mine: Sequence[ShownPoint], across: Value, up: Value) -> None:
    places = [(across(one.point.measured.report) or 0.0, up(one.point.measured.report) or 0.0) for one in mine]
    best = frontier(places)
    # What is between two loads was not measured: a step, since whoever wants to be served faster gets the next load.
    figure.scatter(
        [x for x, _ in best], [y for _, y in best], mode="lines", hoverinfo="skip",
        name=f"{run.letter} frontier".strip(),
        line={"color": run.style.color, "dash": run.style.dash, "width": 2, "shape": "vh"},
    )  # fmt: skip
    figure.scatter(
        [x for x, _ in places], [y for _, y in places], mode="markers+text", name=run.letter or "loads",
        text=[one.label if len(mine) > 1 else "" for one in mine], textposition="top right", textfont={"size": 11},
        marker={"color": run.style.color, "symbol": run.style.symbol, "size": 9},
        hovertemplate="%{text}: %{y:,.4g} at %{x:,.4g} tokens/s a user<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def _table(known: Sequence[ShownPoint]) -> Table:
    rows: list[Row] = []
    for shown in known:
        report = shown.point.measured.report
        rows.append((shown.title, (
            number(interactivity(report)), number(report.output_tokens_per_second_per_gpu),
            number(report.total_tokens_per_second_per_gpu), number(report.output_tokens_per_second),
            number(report.total_tokens_per_second), whole(report.run.gpus),
        )))  # fmt: skip
    head = ("tokens/s", "a user", "output, a GPU", "all, a GPU", "output", "all", "GPUs")
    return Table("throughput", head, rows)


def endpoints(compared: Compared) -> Section | None:
    """Return the system's tokens/s as steps over 1,000 / P90 TPOT; None: no run has that preset."""
    known = [
        shown
        for shown in compared.points
        if shown.run.benchmark.about.preset == ENDPOINTS and slow_interactivity(shown.point.measured.report) is not None
    ]
    if not known:
        return None
    unit = "output tokens/s of all GPUs"
    plot = _plot("endpoints", "System", known, slow_interactivity, lambda one: one.output_tokens_per_second, unit)
    rows: list[Row] = []
    for shown in known:
        report = shown.point.measured.report
        rows.append((shown.title, (
            number(report.output_tokens_per_second), number(slow_interactivity(report)),
            ms(percentile(report.tpot, 90)), ms(percentile(report.ttft, 90)),
        )))  # fmt: skip
    head = ("", "system tokens/s", "1,000 / P90 TPOT", "TPOT P90, ms", "TTFT P90, ms")
    said = [
        "What the system gives while nine in ten users have at least so many tokens/s: measured points and steps "
        "between them, nothing smoothed."
    ]
    keys = [Key(run.letter, run.style.color, run.style.dash) for run in compared.runs if run.letter]
    table = Table("endpoints", head, rows)
    return Section("endpoints", "System throughput by endpoint speed", said, [plot], [table], keys)


def accuracy(compared: Compared) -> Section | None:
    """Return what the engine answered right after each load; None: nobody asked."""
    rows: list[Row] = []
    for shown in compared.points:
        asked = shown.point.accuracy
        if asked is not None:
            rows.append(
                (
                    shown.title,
                    (asked.name, whole(asked.right), whole(asked.asked), whole(asked.failed), share(asked.score)),
                )
            )
    if not rows:
        return None
    said = "Questions with one right answer, asked of the same engine after each load; those that failed are not right."
    table = Table("accuracy", ("", "set", "right", "asked", "failed", "score"), rows)
    return Section("accuracy", "Accuracy", [said], tables=[table])
