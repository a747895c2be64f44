"""Where the time to first token goes: to the queue, to prefill, to the host; and to the hand-off that follows it."""

from collections.abc import Sequence

from ...metrics.load_report import Parts
from .drawing import Figure
from .facts import ms
from .numbers import duration, percent
from .parts import UNKNOWN, Key, Plot, Row, Section, Table
from .runs import GREY, OCHRE, PURPLE, RED, Compared, ShownPoint

_PARTS = (
    ("queue", "queue", OCHRE), ("prefill", "prefill", RED), ("host", "host", GREY),
    ("handoff", "hand-off, after the first token", PURPLE),
)  # fmt: skip
_KINDS = (("parts", "mean", "Mean"), ("worst_parts", "worst", "Slowest 1 %"))


def first_token(compared: Compared) -> Section:
    """Return TTFT in parts, of all requests and of the slowest."""
    known = [shown for shown in compared.points if shown.point.measured.report.parts is not None]
    heading = "Where the first token's time goes"
    if not known:
        return Section("first-token", heading, ["No request finished, so no time to first token can be divided."])
    plots = [_plot(known, field, name, title) for field, name, title in _KINDS]
    keys = [Key(text, color, is_block=True) for _, text, color in _PARTS]
    return Section("first-token", heading, _sentences(compared, known), plots, [_table(known)], keys)


def _sentences(compared: Compared, known: Sequence[ShownPoint]) -> list[str]:
    said = []
    for run in compared.runs:
        mine = [shown for shown in known if shown.run is run]
        if not mine:
            continue
        last = max(mine, key=lambda shown: shown.came)
        parts, worst = last.point.measured.report.parts, last.point.measured.report.worst_parts
        assert parts is not None
        if _ttft(parts) <= 0:
            continue
        text = f"the mean TTFT, {_largest(parts)}"
        if worst is not None and _ttft(worst) > 0:
            text += f"; that of the slowest 1 %, {_largest(worst)}"
        said.append(last.say(f"{text}."))
    return said


def _largest(parts: Parts) -> str:
    """Say which part is the largest."""
    name, value = max(
        ((text, getattr(parts, part)) for part, text, _ in _PARTS if part != "handoff"), key=lambda pair: pair[1]
    )
    return f"{duration(_ttft(parts))}, is mostly {name} ({percent(value / _ttft(parts))})"


def _ttft(parts: Parts) -> float:
    return parts.queue + parts.prefill + parts.host


def _plot(known: Sequence[ShownPoint], field: str, name: str, title: str) -> Plot:
    figure = Figure("ms", height=92 + 30 * len(known))
    rows = [shown.title for shown in known]
    for part, text, color in _PARTS:
        values = [1000 * getattr(getattr(shown.point.measured.report, field), part) for shown in known]
        figure.bars(
            values, list(range(len(known))), name=text, marker={"color": color},
            text=rows, textposition="none", hovertemplate=f"%{{text}}: {text} %{{x:,.4g}} ms<extra></extra>",
        )  # fmt: skip
    figure.rows(rows, gap=0.3, mode="stack")
    return Plot(f"ttft-parts-{name}", title, "ms", figure)


def _table(known: Sequence[ShownPoint]) -> Table:
    rows: list[Row] = []
    for shown in known:
        for field, _, title in _KINDS:
            parts = getattr(shown.point.measured.report, field)
            values = [] if parts is None else [_ttft(parts), *(getattr(parts, one) for one, _, _ in _PARTS)]
            rows.append(
                (f"{shown.title}: {title[0].lower()}{title[1:]}", [ms(value) for value in values] or [UNKNOWN] * 5)
            )
    return Table("ttft-parts", ("ms", "TTFT", "queue", "prefill", "host", "then hand-off"), rows)
