"""What ran and what came of it at a glance; two runs with the same loads, by how much they differ."""

from collections.abc import Callable, Sequence

from ...metrics.distribution import percentile
from ...metrics.load_report import LoadReport
from .numbers import change, count, duration, milliseconds, percent, plain
from .parts import UNKNOWN, Cell, Row, Section, Table
from .runs import Compared, ShownPoint, ShownRun

_COMPARED: Sequence[tuple[str, Callable[[LoadReport], float | None]]] = (
    ("TTFT P50", lambda report: percentile(report.ttft, 50)),
    ("TTFT P90", lambda report: percentile(report.ttft, 90)),
    ("TTFT P99", lambda report: percentile(report.ttft, 99)),
    ("TPOT P50", lambda report: percentile(report.tpot, 50)),
    ("TPOT P90", lambda report: percentile(report.tpot, 90)),
    ("E2E P50", lambda report: percentile(report.e2e, 50)),
    ("output tokens/s", lambda report: report.output_tokens_per_second),
    ("goodput", lambda report: None if report.goodput is None else report.goodput.per_second),
)


def what_ran(compared: Compared) -> Section:
    """Say of each run what it was: all that holds its figures back stands here."""
    columns = [dict(_facts(run)) for run in compared.runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "\N{EN DASH}") for column in columns]) for name in names]
    head = ["", *(run.letter or "this run" for run in compared.runs)]
    return Section("runs", "What ran", _cautions(compared), tables=[Table("runs", head, rows)])


def _facts(run: ShownRun) -> list[tuple[str, str]]:
    about, points = run.benchmark
    ran = points[0].measured.report.run
    source = {"measured": "measured on a real engine", "simulated": "simulated, in virtual time"}[ran.source]
    facts = [("name", run.name), ("figures", source), ("model", ran.model)]
    facts += [("devices", f"{ran.gpus} x {ran.device}"), ("topology", ran.topology), ("policy", ran.policy)]
    if about.shaped_like is not None:
        facts.append(("preset", f"{about.preset}, shaped like {about.shaped_like}; unofficial"))
    if about.scale < 1:
        facts.append(("scale", f"{about.scale:g} of the preset's lengths and times"))
    if len({point.measured.report.run.workload for point in points}) == 1:
        facts.append(("load", ran.workload))
    facts.append(("when", about.when or "in virtual time"))
    if ran.seed is not None:
        facts.append(("seed", str(ran.seed)))
    notes = dict.fromkeys([*about.notes, *(note for point in points for note in point.measured.report.run.notes)])
    if notes:
        facts.append(("notes", "; ".join(notes)))
    return facts


def _cautions(compared: Compared) -> list[str]:
    said = []
    if any(run.benchmark.about.shaped_like for run in compared.runs):
        said.append("Unofficial: a preset is shaped like a benchmark of the field and is not that benchmark.")
    if any(run.benchmark.about.scale < 1 for run in compared.runs):
        said.append("Lengths and times are scaled down, so no figure compares with the published ones.")
    if any(point.point.measured.report.run.source == "simulated" for point in compared.points):
        said.append("A simulation's figures are predictions.")
    return said


def glance(compared: Compared) -> Section:
    """Sum up each load in a row; and the runs beside each other, where they have loads of the same name."""
    sentences = [_outcome(compared)]
    tables = [_glance_table(compared)]
    pairs = _pairs(compared)
    if pairs:
        sentences.append("The second table is what B has more or less than A at the same load.")
        head = ("B against A", *(name for name, _ in _COMPARED))
        tables.append(Table("change", head, [_changes(*two) for two in pairs]))
    elif len(compared.runs) == 2:
        sentences.append("The two runs have no load of the same name, so no row is set against another.")
    return Section("glance", "At a glance", sentences, tables=tables)


def _outcome(compared: Compared) -> str:
    ended: dict[str, int] = {}
    for shown in compared.points:
        for reason, number in shown.point.measured.report.ended.items():
            ended[reason] = ended.get(reason, 0) + number
    total = sum(ended.values())
    finished = sum(shown.point.measured.report.finished for shown in compared.points)
    if finished == total:
        return f"All {count(total, 'request')} finished."
    lost = ", ".join(f"{number:,} {reason}" for reason, number in ended.items() if reason not in ("stop", "length"))
    return (
        f"{finished:,} of {count(total, 'request')} finished ({lost}). Latencies are of those that finished; "
        f"goodput counts the others as misses, but for aborted ones."
    )


def _glance_table(compared: Compared) -> Table:
    head = (
        "", "requests", "finished", "seconds", "requests/s", "TTFT P50, ms", "TTFT P99, ms", "TPOT P50, ms",
        "TPOT P99, ms", "output tokens/s", "a GPU", "all tokens/s", "SLO met", "utilisation",
    )  # fmt: skip
    return Table("glance", head, [_glance_row(shown) for shown in compared.points])


def _glance_row(shown: ShownPoint) -> Row:
    report = shown.point.measured.report
    good = report.goodput
    rate = report.requests / report.wall if report.wall > 0 else None
    return shown.title, (
        whole(report.requests), whole(report.finished), number(report.wall), number(rate),
        ms(percentile(report.ttft, 50)), ms(percentile(report.ttft, 99)),
        ms(percentile(report.tpot, 50)), ms(percentile(report.tpot, 99)),
        number(report.output_tokens_per_second), number(report.output_tokens_per_second_per_gpu),
        number(report.total_tokens_per_second), share(None if good is None else good.share), share(report.utilisation),
    )  # fmt: skip


def _pairs(compared: Compared) -> list[tuple[ShownPoint, ShownPoint]]:
    """Return the loads of two runs that belong together: those of one name, or the only ones."""
    if len(compared.runs) != 2:
        return []
    before, after = map(compared.points_of, compared.runs)
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    named = {shown.point.name: shown for shown in after}
    return [(shown, named[shown.point.name]) for shown in before if shown.point.name in named]


def _changes(before: ShownPoint, after: ShownPoint) -> Row:
    cells = []
    for _, figure in _COMPARED:
        a, b = figure(before.point.measured.report), figure(after.point.measured.report)
        cells.append(UNKNOWN if not a or b is None else Cell(change(a, b), b / a - 1))
    return before.name, cells


def whole(value: int) -> Cell:
    """Return the cell of a count."""
    return Cell(f"{value:,}", value)


def number(value: float | None) -> Cell:
    """Return the cell of a number; None: it is not known."""
    return UNKNOWN if value is None else Cell(plain(value), value)


def ms(seconds: float | None) -> Cell:
    """Return the cell of seconds, shown in ms and held as they are."""
    return UNKNOWN if seconds is None else Cell(milliseconds(seconds), seconds)


def share(value: float | None) -> Cell:
    """Return the cell of a share of 0 to 1, shown in percent."""
    return UNKNOWN if value is None else Cell(percent(value), value)


def lateness(compared: Compared) -> str | None:
    """Say by how much the driver was late; None: there was none that could be."""
    late = [one for shown in compared.points if (one := shown.point.measured.report.late) is not None]
    if not late:
        return None
    worst = max(one.p99 for one in late)
    return f"99 of 100 requests were sent at most {duration(worst)} after their times, from which TTFT counts."
