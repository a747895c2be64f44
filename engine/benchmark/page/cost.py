"""What tokens cost in dollars and in joules; only where a price is known, and where power was measured.

$ per million tokens divides the price of all GPUs by one kind of tokens, so the three do not add up. Joules are those
of the boards over the measured window; what a name plate says is no measurement, and is not shown.
"""

from collections.abc import Sequence

from ...metrics.load_report import LoadReport
from ..published import interactivity
from .drawing import Figure
from .facts import number
from .numbers import plain
from .parts import Key, Plot, Row, Section, Table
from .runs import Compared, ShownPoint

_NO_PRICE = "No price of a GPU-hour is known, so there is no cost: give --gpu-hour-price."
_NO_POWER = (
    "Power was not measured, so there are no joules: that takes --power, a real run on GPUs whose boards NVML reads, "
    "and the extra 'power'."
)


def cost(compared: Compared) -> Section:
    """Return $ per million tokens and joules per token, or why there are none."""
    priced = [shown for shown in compared.points if shown.point.measured.report.dollars is not None]
    said = _prices(priced) if priced else [_NO_PRICE]
    powered = [shown for shown in compared.points if _is_measured(shown.point.measured.report)]
    said.append(_power(powered) if powered else _NO_POWER)
    plots, keys = [], list[Key]()
    drawn = [shown for shown in priced if _output_dollars(shown.point.measured.report) is not None]
    if len(drawn) > 1:
        plots = [_plot(compared, drawn)]
        keys = [Key(run.letter, run.style.color, run.style.dash) for run in compared.runs if run.letter]
    tables = [_dollar_table(priced)] if priced else []
    tables += [_joule_table(powered)] if powered else []
    return Section("cost", "Cost and energy", said, plots, tables, keys)


def _prices(priced: Sequence[ShownPoint]) -> list[str]:
    prices = {shown.point.measured.report.dollars_per_gpu_hour or 0.0 for shown in priced}
    named = " and ".join(f"${price:,.2f}" for price in sorted(prices))
    said = f"At {named} per GPU-hour, all GPUs paid for all the time"
    known = [(value, shown) for shown in priced if (value := _output_dollars(shown.point.measured.report)) is not None]
    if not known:
        return [f"{said}; no tokens were generated."]
    least, where = min(known, key=lambda pair: pair[0])
    return [f"{said}, a million output tokens costs ${plain(least)} at its cheapest ({where.title})."]


def _output_dollars(report: LoadReport) -> float | None:
    return None if report.dollars is None else report.dollars.output


def _is_measured(report: LoadReport) -> bool:
    return report.power is not None and report.power.basis == "board" and report.joules is not None


def _power(powered: Sequence[ShownPoint]) -> str:
    watts = [shown.point.measured.report.power.watts for shown in powered if shown.point.measured.report.power]
    span = plain(watts[0]) if len(watts) == 1 else f"{plain(min(watts))} to {plain(max(watts))}"
    return f"A board drew {span} W in the mean, by NVML's counters of energy over the measured window."


def _plot(compared: Compared, drawn: Sequence[ShownPoint]) -> Plot:
    figure = Figure("tokens/s a user, P50")
    for run in compared.runs:
        mine = [one for one in drawn if one.run is run and interactivity(one.point.measured.report) is not None]
        figure.scatter(
            [interactivity(one.point.measured.report) for one in mine],
            [_output_dollars(one.point.measured.report) for one in mine], mode="markers+text",
            text=[one.label for one in mine], textposition="top right", textfont={"size": 11},
            name=run.letter or "loads", marker={"color": run.style.color, "symbol": run.style.symbol, "size": 9},
        )  # fmt: skip
    figure.x["rangemode"] = figure.y["rangemode"] = "tozero"
    return Plot("dollars", "Price of speed", "$ per million output tokens", figure)


def _dollar_table(priced: Sequence[ShownPoint]) -> Table:
    rows: list[Row] = []
    for shown in priced:
        dollars = shown.point.measured.report.dollars
        assert dollars is not None
        cells = (dollars.per_gpu_hour, dollars.input, dollars.output, dollars.total)
        rows.append((shown.title, [number(one) for one in cells]))
    return Table("dollars", ("$ per million", "a GPU-hour", "input tokens", "output tokens", "all tokens"), rows)


def _joule_table(powered: Sequence[ShownPoint]) -> Table:
    rows: list[Row] = []
    for shown in powered:
        report = shown.point.measured.report
        watts = None if report.power is None else report.power.watts
        prompt, output = report.tokens.prompt, report.tokens.output
        per_token = (_joules_of(report, count) for count in (prompt, output, prompt + output))
        rows.append((shown.title, [number(one) for one in (watts, report.joules, *per_token)]))
    head = ("joules", "watts a GPU", "of all GPUs", "an input token", "an output token", "a token of either")
    return Table("joules", head, rows)


def _joules_of(report: LoadReport, tokens: int) -> float | None:
    return None if report.joules is None or not tokens else report.joules / tokens
