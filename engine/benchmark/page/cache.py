"""KV memory and the prefix cache, load by load: how full, what share of prompts was there already, and why the rest was
not."""

from collections.abc import Sequence

from .drawing import Figure, shares
from .facts import share, whole
from .numbers import percent
from .parts import UNKNOWN, Key, Plot, Row, Section, Table
from .runs import BLUE, GREEN, GREY, OCHRE, PURPLE, RED, Compared, ShownPoint

# Of protocol/cache_report.py's reasons; the commonest first, so that those have colours of their own.
_COLORS = {
    "never seen": GREY, "evicted": RED, "other mesh": BLUE, "last page": OCHRE, "not reusable": PURPLE,
    "differs": "#8c6d31", "weights changed": "#5f7fbf", "mesh lost": "#a3485a",
}  # fmt: skip

_FOUND = "found"


def cache(compared: Compared) -> Section:
    """Return how full KV memory was, hit rates, and reasons for misses."""
    known = [shown for shown in compared.points if _total(shown)]
    said = [_hits(compared)]
    plots, keys = [], list[Key]()
    if known:
        reasons = _reasons(known)
        plots = [_plot(known, reasons)]
        keys = [Key(name, _color(name), is_block=True) for name in (_FOUND, *reasons)]
    else:
        said.append("Why the rest was not found is not known: nobody counted the reasons.")
    return Section("cache", "KV use and the prefix cache", said, plots, [_table(compared)], keys)


def _color(name: str) -> str:
    return GREEN if name == _FOUND else _COLORS.get(name, GREY)


def _reasons(known: Sequence[ShownPoint]) -> list[str]:
    found = {reason for shown in known for reason in shown.point.measured.report.missed_tokens}
    order = list(_COLORS)
    return sorted(found, key=lambda reason: (order.index(reason) if reason in order else len(order), reason))


def _total(shown: ShownPoint) -> int:
    """Return the prompt tokens whose fate is known; 0: nobody counted reasons."""
    report = shown.point.measured.report
    missed = sum(report.missed_tokens.values())
    return missed + report.tokens.cached if missed else 0


def _hits(compared: Compared) -> str:
    texts = []
    for run in compared.runs:
        reports = [shown.point.measured.report for shown in compared.points_of(run)]
        prompt = sum(report.tokens.prompt for report in reports)
        if not prompt:
            continue
        cached = sum(report.tokens.cached for report in reports)
        missed: dict[str, int] = {}
        for report in reports:
            for reason, tokens in report.missed_tokens.items():
                missed[reason] = missed.get(reason, 0) + tokens
        text = f"{percent(cached / prompt)} of prompt tokens were found in the prefix cache"
        if missed:
            reason = max(missed, key=lambda one: missed[one])
            text += f"; of those that were not, {percent(missed[reason] / sum(missed.values()))} were “{reason}”"
        texts.append(run.say(f"{text}."))
    return " ".join(texts) or "No request finished, so nothing tells what was found."


def _plot(known: Sequence[ShownPoint], reasons: Sequence[str]) -> Plot:
    figure = Figure("share of prompt tokens", height=92 + 30 * len(known))
    rows = list(range(len(known)))
    counted = {_FOUND: [shown.point.measured.report.tokens.cached for shown in known]}
    counted |= {one: [shown.point.measured.report.missed_tokens.get(one, 0) for shown in known] for one in reasons}
    for name, tokens in counted.items():
        figure.bars(
            [count / _total(shown) for count, shown in zip(tokens, known, strict=True)], rows,
            name=name, marker={"color": _color(name)}, customdata=tokens,
            hovertemplate=f"{name}: %{{customdata:,}} tokens, %{{x:.1%}}<extra></extra>",
        )  # fmt: skip
    figure.rows([shown.title for shown in known], gap=0.3, mode="stack")
    shares(figure.x, most=1)
    return Plot("misses", "Prompt tokens", "found in the prefix cache, or why not", figure)


def _table(compared: Compared) -> Table:
    reasons = _reasons(compared.points)
    rows: list[Row] = []
    for shown in compared.points:
        measured = shown.point.measured
        report, series = measured.report, measured.series
        used = [max(mesh.kv_used, default=0.0) for mesh in series.meshes] if series is not None else []
        rows.append((shown.title, (
            whole(report.tokens.prompt), whole(report.tokens.cached), share(report.hit_rate),
            share(max(used) if used else None),
            *(UNKNOWN if not report.missed_tokens else whole(report.missed_tokens.get(one, 0)) for one in reasons),
        )))  # fmt: skip
    head = ("tokens", "of prompts", "found", "hit rate", "fullest mesh, KV", *(f"missed: {one}" for one in reasons))
    return Table("cache", head, rows)
