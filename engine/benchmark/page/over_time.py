"""How a run went: roles and flips, who waited and for how long, what was busy beside what first tokens took, KV in use.

Of a sweep one load is shown at a time. Two runs of the same load stand beside each other, on one scale of time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ...metrics.load_report import Flip
from ...metrics.request_records import RequestRecords
from ...metrics.series import Series
from . import bins
from .drawing import Figure, curve, ramp, shares
from .facts import number, whole
from .numbers import count, duration, percent
from .parts import Choice, Key, Plot, Row, Section, Table
from .runs import BLUE, GREEN, GREY, OCHRE, PURPLE, RED, Compared, ShownPoint

ROLES = {"prefill": RED, "decode": BLUE, "both": GREEN}  # those that drain are grey
_MOST_MESHES = 4  # with a curve each
_X = "seconds from the first arrival"


@dataclass(frozen=True)
class Watched:
    """A load whose engine was watched."""

    shown: ShownPoint
    series: Series
    over: bins.Stretches
    until: float  # the end of the scale of time

    @property
    def flips(self) -> Sequence[Flip]:
        """Return the changes of roles."""
        return self.shown.point.measured.report.flips

    @property
    def records(self) -> RequestRecords | None:
        """Return the requests; None: they were not kept."""
        return self.shown.point.measured.records

    @cached_property
    def utilisation(self) -> np.ndarray | None:
        """Return the share [stretches] of the time of all GPUs in steps; None: the report does not say which mesh has
        how many."""
        report = self.shown.point.measured.report
        if len(report.meshes) != len(self.series.meshes):
            return None
        return bins.utilisation(self.series, report, self.over)

    @cached_property
    def slow(self) -> np.ndarray | None:
        """Return the P90 [stretches] of the TTFT of those that arrived, in seconds; None: records were not kept."""
        return None if self.records is None else bins.ttft_by_arrival(self.records, self.over, 90)

    def plot(self, name: str, title: str, unit: str, figure: Figure, keys: Sequence[Key] = ()) -> Plot:
        """Return a figure over time with the run in its title."""
        run, place = self.shown.run, self.shown.place
        figure.x.setdefault("range", [0, self.until])
        where = f"{run.letter.lower() or 'run'}-{place}"
        return Plot(f"{name}-{where}", ", ".join(filter(None, (run.letter, title))), unit, figure, keys)


def over_time(compared: Compared) -> Section:
    """Return the panels of each load."""
    heading = "Over time"
    groups = _groups(compared)
    if not groups:
        lacks = "Nobody took samples of the engine's state, or too few, so how the run went over time is not known."
        flips = [table for shown in compared.points if (table := _flip_table(shown)) is not None]
        return Section("over-time", heading, [lacks], tables=flips)
    said = [
        "Times count from the first arrival. A dotted upright is a flip: a mesh that changed its role. TTFT stands at "
        "the time of arrival, utilisation at the time of computing."
    ]
    choices = [_choice(group) for group in groups]
    counts = [sum(len(one.flips) for one in group) for group in groups]
    chosen = counts.index(max(counts)) if any(counts) else len(choices) - 1
    return Section("over-time", heading, said, choices=choices, chosen=chosen)


def _groups(compared: Compared) -> list[list[Watched]]:
    """Return watched loads: those of two runs that belong together are a group."""
    alone = all(len(run.benchmark.points) == 1 for run in compared.runs)
    shown_by: dict[str, list[ShownPoint]] = {}
    for shown in compared.points:
        shown_by.setdefault("" if alone else shown.point.name, []).append(shown)
    groups = []
    for points in shown_by.values():
        until = max(shown.point.measured.report.wall for shown in points)
        watched = [one for shown in points if (one := _watched(shown, until)) is not None]
        if watched:
            groups.append(watched)
    return groups


def _watched(shown: ShownPoint, until: float) -> Watched | None:
    series = shown.point.measured.series
    over = None if series is None else bins.stretches(series)
    return None if series is None or over is None else Watched(shown, series, over, until)


def _choice(group: Sequence[Watched]) -> Choice:
    sentences = [text for one in group for text in _said(one)]
    plots = [plot for panel in _PANELS for one in group if (plot := panel(one)) is not None]
    tables = [table for one in group if (table := _flip_table(one.shown)) is not None]
    return Choice(group[0].shown.name, plots, tables, sentences)


def _said(one: Watched) -> Iterator[str]:
    say = one.shown.run.say
    if one.flips:
        reasons = ", ".join(dict.fromkeys(flip.reason for flip in one.flips))
        yield say(f"{count(len(one.flips), 'flip')} ({reasons}).")
    elif len(one.series.meshes) > 1:
        roles = ", ".join(dict.fromkeys(one.series.roles[0][1]))
        yield say(f"no mesh changed its role ({roles}).")
    oldest = max(one.series.oldest, default=0.0)
    if oldest > 0:
        waiting = count(max(one.series.waiting), "request")
        yield say(f"up to {waiting} waited for a place at a time, the oldest for up to {duration(oldest)}.")
    else:
        yield say("no sample found a request waiting for a place.")
    if one.records is None:
        yield say("the requests' records were not kept, so TTFT over time is not known.")
    if (text := _not_told(one)) is not None:
        yield say(text)


def _both(one: Watched, fewest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return utilisation, TTFT, and where TTFT is known; None: at fewer stretches of time than `fewest`."""
    used, slow = one.utilisation, one.slow
    if used is None or slow is None:
        return None
    known = ~np.isnan(slow)
    return (used, slow, known) if known.sum() >= fewest else None


def _not_told(one: Watched) -> str | None:
    """Say how much TTFT varied while utilisation hardly did."""
    both = _both(one, 8)
    if both is None:
        return None
    used, slow, known = both
    low, high = np.percentile(used[known], (25, 75))
    slow = slow[known & (used >= low) & (used <= high)]
    least, most = float(slow.min()), float(slow.max())
    text = (
        f"in the half of the time in which utilisation lay between {percent(float(low))} and {percent(float(high))}, "
        f"the P90 of TTFT went from {duration(least)} to {duration(most)}"
    )
    return f"{text}: utilisation does not tell it." if most > 2 * least else f"{text}."


def _roles(one: Watched) -> Plot | None:
    if not one.flips:
        return None
    meshes = len(one.series.meshes)
    figure = Figure(_X, height=84 + 22 * meshes)
    spans = _spans(one)
    for role in dict.fromkeys(role for role, _, _, _ in spans):
        mine = [span for span in spans if span[0] == role]
        figure.bars(
            [end - start for _, _, start, end in mine], [mesh for _, mesh, _, _ in mine],
            base=[start for _, _, start, _ in mine], name=role, marker={"color": ROLES.get(role, GREY)},
            hovertemplate=f"mesh %{{y}}: {role} from %{{base:.4g}} s<extra></extra>",
        )  # fmt: skip
    figure.scatter(
        [flip.t for flip in one.flips], [flip.mesh for flip in one.flips], mode="markers", name="flips",
        marker={"symbol": "diamond", "size": 9, "color": "#ffffff", "line": {"color": "#202020", "width": 1.5}},
        text=[f"{flip.before} to {flip.after}: {flip.reason}" for flip in one.flips],
        hovertemplate="mesh %{y} at %{x:.4g} s: %{text}<extra></extra>",
    )  # fmt: skip
    figure.rows([str(mesh) for mesh in range(meshes)], gap=0.25, mode="overlay")
    seen = dict.fromkeys(role for role, _, _, _ in spans)
    keys = [Key(role, ROLES.get(role, GREY), is_block=True) for role in seen]
    return one.plot("roles", "Roles", "of each mesh; a diamond is a flip", figure, keys)


def _spans(one: Watched) -> list[tuple[str, int, float, float]]:
    """Return for how long each mesh had a role: the role, the mesh, from when and until when."""
    changes = [*((max(0.0, t), roles) for t, roles in one.series.roles), (one.until, ())]
    spans: list[tuple[str, int, float, float]] = []
    for mesh in range(len(one.series.meshes)):
        for (start, roles), (end, _) in pairwise(changes):
            if end > start:
                last = spans[-1] if spans else None
                if last is not None and last[:2] == (roles[mesh], mesh) and last[3] == start:
                    spans[-1] = (*last[:3], end)
                else:
                    spans.append((roles[mesh], mesh, start, end))
    return spans


def _oldest(one: Watched) -> Plot | None:
    if not any(one.series.oldest):
        return None
    figure = _timed(one)
    _add(figure, one.series.t, one.series.oldest, "oldest", OCHRE)
    return one.plot("oldest", "Queue age", "seconds that the oldest has waited", figure)


def _waiting(one: Watched) -> Plot:
    figure = _timed(one)
    _add(figure, one.series.t, one.series.running, "in the engine", GREY, "dot")
    _add(figure, one.series.t, one.series.waiting, "waiting", OCHRE)
    keys = [Key("waiting for a place", OCHRE), Key("in the engine, waiting or not", GREY, "dot")]
    return one.plot("waiting", "Requests", "at a time", figure, keys)


def _ttft(one: Watched) -> Plot | None:
    if one.records is None or one.slow is None:
        return None
    figure = _timed(one)
    middles = curve(one.over.middles)
    middle = bins.ttft_by_arrival(one.records, one.over, 50)
    for name, values, dash in (("P50", middle, "dot"), ("P90", one.slow, "solid")):
        figure.scatter(
            middles, curve(1000 * values), mode="lines+markers", marker={"size": 4}, name=name,
            line={"color": PURPLE, "dash": dash, "width": 2},
        )  # fmt: skip
    figure.y["rangemode"] = "tozero"
    return one.plot("ttft", "TTFT", "ms, by time of arrival", figure, [Key("P90", PURPLE), Key("P50", PURPLE, "dot")])


def _utilisation(one: Watched) -> Plot | None:
    figure, report, used = _timed(one), one.shown.point.measured.report, one.utilisation
    if used is None:
        return None
    middles = curve(one.over.middles)
    by_role = bins.utilisation_by_role(one.series, report, one.over)
    keys = [Key("all GPUs", GREY)]
    figure.scatter(
        middles, curve(used), mode="lines", name="all GPUs",
        line={"color": GREY, "width": 3},
    )  # fmt: skip
    for role, values in by_role.items() if len(by_role) > 1 else ():
        color, dash = ROLES.get(role, GREY), {"prefill": "dash", "decode": "dot"}.get(role, "dashdot")
        figure.scatter(middles, curve(values), mode="lines", name=role, line={"color": color, "dash": dash, "width": 2})
        keys.append(Key(role, color, dash))
    shares(figure.y)
    return one.plot("utilisation", "Utilisation", "share of time in steps", figure, keys)


def _scatter(one: Watched) -> Plot | None:
    """Draw what a dashboard shows against what users wait: a point a stretch of time."""
    both = _both(one, 2)
    if both is None:
        return None
    used, slow, known = both
    figure = Figure("utilisation of all GPUs")
    figure.scatter(
        curve(used[known]), curve(1000 * slow[known]), mode="markers", name="stretches of time",
        marker={"color": PURPLE, "size": 7, "opacity": 0.7},
        text=[f"{t:.4g} s" for t in one.over.middles[known]],
        hovertemplate="at %{text}: %{y:,.4g} ms, %{x:.1%} busy<extra></extra>",
    )  # fmt: skip
    shares(figure.x)
    figure.y["rangemode"] = "tozero"
    return one.plot("utilisation-ttft", "TTFT beside utilisation", "P90 in ms, a point a stretch of time", figure)


def _kv(one: Watched) -> Plot:
    figure, keys = _timed(one), list[Key]()
    meshes = [mesh.kv_used for mesh in one.series.meshes]
    if len(meshes) > _MOST_MESHES:
        table = np.array(meshes)
        named = [("fullest mesh", table.max(0).tolist(), RED, "solid"), ("mean", table.mean(0).tolist(), BLUE, "dash")]
    else:
        named = [(f"mesh {place}", used, ramp(place, len(meshes)), "solid") for place, used in enumerate(meshes)]
    for name, values, color, dash in named:
        _add(figure, one.series.t, values, name, color, dash)
        keys.append(Key(name, color, dash))
    figure.y["tickformat"] = ".0%"
    return one.plot("kv", "KV pages in use", "share of a mesh's pages", figure, keys if len(keys) > 1 else ())


def _hits(one: Watched) -> Plot | None:
    cached = bins.grown(one.series, one.series.cached_tokens, one.over)
    prompt = bins.grown(one.series, one.series.prompt_tokens, one.over)
    if not cached.any():
        return None
    figure = _timed(one)
    share = np.where(prompt > 0, cached / np.maximum(prompt, 1e-9), np.nan)
    figure.scatter(
        curve(one.over.middles), curve(share), mode="lines+markers", marker={"size": 4}, name="found",
        line={"color": GREEN, "width": 2},
    )  # fmt: skip
    shares(figure.y)
    return one.plot("hits", "Prompt tokens found cached", "share of prompts that began", figure)


def _timed(one: Watched) -> Figure:
    """Return a figure over time with its flips."""
    figure = Figure(_X, height=220)
    for flip in one.flips[:40]:  # each an object of the drawing
        figure.line(x=flip.t)
    return figure


def _add(
    figure: Figure, t: Sequence[float], values: Sequence[float], name: str, color: str, dash: str = "solid"
) -> None:
    xs, ys = bins.peaks(t, values)
    figure.scatter(
        curve(xs), curve(ys), mode="lines", name=name, line={"color": color, "dash": dash, "width": 1.75, "shape": "hv"}
    )
    figure.y["rangemode"] = "tozero"


def _flip_table(shown: ShownPoint) -> Table | None:
    rows: list[Row] = [
        (f"{place + 1}", (number(flip.t), whole(flip.mesh), flip.before, flip.after, flip.reason))
        for place, flip in enumerate(shown.point.measured.report.flips)
    ]
    head = ((shown.run.letter and f"flip of {shown.run.letter}") or "flip", "seconds", "mesh", "from", "to", "reason")
    return Table(f"flips-{shown.run.letter.lower() or 'run'}-{shown.place}", head, rows) if rows else None


_PANELS: Sequence[Callable[[Watched], Plot | None]] = (
    _roles, _oldest, _waiting, _ttft, _utilisation, _scatter, _kv, _hits
)  # fmt: skip
