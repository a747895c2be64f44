"""How the SLO was kept to, against the rate at which requests came; whoever failed is in the denominator."""

from collections.abc import Sequence

from ...protocol.service import SLO
from .drawing import Figure, shares
from .facts import number, share, whole
from .numbers import percent, plain
from .parts import Cell, Key, Plot, Row, Section, Table
from .runs import GREY, Compared, ShownPoint, ShownRun

_LACKS = "No request had a target to keep to, so there is no goodput: give --slo when you measure."
_KINDS = (("share", "both", "solid"), ("ttft_share", "TTFT alone", "dash"), ("tpot_share", "TPOT alone", "dot"))


def goodput(compared: Compared) -> Section:
    """Return goodput and attainment against rate, or why there are none."""
    judged = [shown for shown in compared.points if shown.point.measured.report.goodput is not None]
    if not judged:
        return Section("goodput", "Goodput and SLO attainment", [_LACKS])
    plots, keys = [], list[Key]()
    if len({shown.came for shown in judged}) > 1:
        plots = [_rates(compared, judged), _attained(compared, judged)]
        keys = [Key(run.letter, run.style.color) for run in compared.runs if run.letter]
    return Section("goodput", "Goodput and SLO attainment", _sentences(compared, judged), plots, [_table(judged)], keys)


def _mine(judged: Sequence[ShownPoint], run: ShownRun) -> list[ShownPoint]:
    return sorted((shown for shown in judged if shown.run is run), key=lambda shown: shown.came)


def _sentences(compared: Compared, judged: Sequence[ShownPoint]) -> list[str]:
    slos = dict.fromkeys(_slo(good.slo) for shown in judged if (good := shown.point.measured.report.goodput))
    said = [f"Asked for: {'; or '.join(slos)}."]
    for run in compared.runs:
        mine = _mine(judged, run)
        if not mine:
            continue
        best = max(mine, key=_per_second)
        text = (
            f"goodput is highest, {plain(_per_second(best))} requests/s, where {plain(best.came)} came "
            f"({percent(_share(best))} met it){_feasible(mine)}."
        )
        said.append(run.say(text))
    return said


def _feasible(mine: Sequence[ShownPoint]) -> str:
    """Say up to which rate as many as were asked kept to each target."""
    verdicts = [(shown, good.is_attained) for shown in mine if (good := shown.point.measured.report.goodput)]
    if all(verdict is None for _, verdict in verdicts):
        return ""
    kept = [shown for shown, verdict in verdicts if verdict]
    return f"; the highest rate that keeps to it is {plain(kept[-1].came)}/s" if kept else "; no rate keeps to it"


def _per_second(shown: ShownPoint) -> float:
    good = shown.point.measured.report.goodput
    return 0.0 if good is None else good.per_second


def _share(shown: ShownPoint) -> float:
    good = shown.point.measured.report.goodput
    return 0.0 if good is None else good.share


def _slo(slo: SLO | None) -> str:
    if slo is None:
        return "what each request has as its own"
    named = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms))
    text = ", ".join(f"{name} ≤ {value:g} ms" for name, value in named if value is not None)
    return text if slo.percentile is None else f"{text}, each by {slo.percentile:g} % of requests"


def _rates(compared: Compared, judged: Sequence[ShownPoint]) -> Plot:
    figure = Figure("requests/s that came")
    most = max(shown.came for shown in judged)
    figure.scatter(
        [0, most], [0, most], mode="lines", line={"color": GREY, "width": 1, "dash": "dot"}, name="all of them",
        hoverinfo="skip",
    )  # fmt: skip
    for run in compared.runs:
        mine = _mine(judged, run)
        _curve(figure, run, mine, [_per_second(shown) for shown in mine], "solid", run.letter or "goodput")
    figure.y["rangemode"] = "tozero"
    keys = [Key("as many as came", GREY, "dot")]
    return Plot("goodput-by-rate", "Goodput", "requests/s that met the SLO", figure, keys)


def _attained(compared: Compared, judged: Sequence[ShownPoint]) -> Plot:
    figure = Figure("requests/s that came")
    for run in compared.runs:
        mine = _mine(judged, run)
        for field, text, dash in _KINDS:
            values = [getattr(shown.point.measured.report.goodput, field) for shown in mine]
            _curve(figure, run, mine, values, dash, " ".join(filter(None, (run.letter, text))))
    shares(figure.y)
    slos = {good.slo for shown in judged if (good := shown.point.measured.report.goodput)}
    for percentile in sorted({slo.percentile for slo in slos if slo is not None and slo.percentile is not None}):
        figure.line(y=percentile / 100)
        figure.note(percentile / 100, f"asked: {percentile:g} %")
    keys = [Key(text, "currentColor", dash) for _, text, dash in _KINDS]
    return Plot("attainment-by-rate", "Attainment", "share of requests that kept to it", figure, keys)


def _curve(
    figure: Figure, run: ShownRun, mine: Sequence[ShownPoint], values: Sequence[float], dash: str, name: str
) -> None:
    figure.scatter(
        [shown.came for shown in mine], values, mode="lines+markers", name=name,
        text=[shown.name for shown in mine],
        hovertemplate="%{text}: %{y:.4g} at %{x:.4g}/s<extra>%{fullData.name}</extra>",
        line={"color": run.style.color, "dash": dash, "width": 2}, marker={"symbol": run.style.symbol, "size": 7},
        cliponaxis=False,
    )  # fmt: skip


def _table(judged: Sequence[ShownPoint]) -> Table:
    rows: list[Row] = []
    for shown in judged:
        good = shown.point.measured.report.goodput
        assert good is not None
        verdict = {True: "kept", False: "missed", None: "\N{EN DASH}"}[good.is_attained]
        rows.append((shown.title, (
            number(shown.came), whole(good.judged), whole(good.met), share(good.share), share(good.ttft_share),
            share(good.tpot_share), number(good.per_second), Cell(verdict),
        )))  # fmt: skip
    head = ("", "came/s", "judged", "met both", "share", "TTFT", "TPOT", "goodput/s", "at its percentile")
    return Table("goodput", head, rows)
