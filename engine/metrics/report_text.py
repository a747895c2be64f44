"""A load report as a page of text, at most 80 columns wide, that fits a terminal."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from ..protocol.service import SLO
from .distribution import Distribution
from .load_report import LoadReport, MeshUse, Parts

WIDTH = 80
_MOST_FLIPS = 8  # shown, the latest
_MOST_GROUPS = 6  # of meshes with one role


def as_text(report: LoadReport) -> str:
    """Return the page, lines ended by a line feed."""
    lines = [
        *_heading(report), "", *_latencies(report), "", *_goodput(report), *_throughput(report), *_utilisation(report),
        *_cost(report), *_flips(report),
    ]  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def _heading(report: LoadReport) -> Iterator[str]:
    run = report.run
    seed = "" if run.seed is None else f", seed {run.seed}"
    yield from _wrapped(f"{run.workload}, {run.source}{seed}")
    yield from _wrapped(f"{run.model} on {run.gpus} x {run.device}: {run.topology}, {run.policy}")
    yield from (line for note in run.notes for line in _wrapped(f"Note: {note}"))
    rate = report.requests / report.wall if report.wall > 0 else 0.0
    ended = ", ".join(f"{count:,} {reason}" for reason, count in report.ended.items())
    yield from _wrapped(f"{report.requests:,} requests in {report.wall:,.1f} s ({rate:,.2f}/s): {ended}")
    windows = [f"{_or_unknown(value, '.2f')} at {window} s" for window, value in report.dispersion.items()]
    yield from _wrapped(f"Dispersion of arrivals: {', '.join(windows)} (Poisson: 1)")


def _latencies(report: LoadReport) -> Iterator[str]:
    yield f"{'ms':10}{'mean':>12}{'P50':>12}{'P90':>12}{'P99':>12}"
    rows = {"TTFT": report.ttft, "TPOT": report.tpot, "ITL": report.itl, "E2E": report.e2e}
    yield from (f"{name:10}{_row(row)}" for name, row in rows.items() if row is not None)
    if report.parts is None or report.worst_parts is None:
        return
    yield ""
    yield f"{'ms':25}{'queue':>11}{'prefill':>11}{'host':>11}{'then hand-off':>16}"
    yield f"{'of TTFT, mean':25}{_parts(report.parts)}"
    yield f"{'of TTFT, the worst 1 %':25}{_parts(report.worst_parts)}"


def _goodput(report: LoadReport) -> Iterator[str]:
    good = report.goodput
    if good is None:
        return
    yield from _wrapped(
        f"SLO {_slo(good.slo)}: {good.met:,} of {good.judged:,} requests met it ({good.share:.2%}; TTFT "
        f"{good.ttft_share:.2%}, TPOT {good.tpot_share:.2%}): goodput {good.per_second:,.2f}/s{_verdict(report)}"
    )


def _verdict(report: LoadReport) -> str:
    good = report.goodput
    if good is None or good.is_attained is None or good.slo is None:
        return ""
    return f"; asked of {good.slo.percentile:g} %: {'kept' if good.is_attained else 'missed'}"


def _slo(slo: SLO | None) -> str:
    if slo is None:
        return "of each request"
    named = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms))
    return ", ".join(f"{name} {value:g} ms" for name, value in named if value is not None)


def _throughput(report: LoadReport) -> Iterator[str]:
    output, total = report.output_tokens_per_second, report.total_tokens_per_second
    yield from _wrapped(
        f"Tokens/s: {output:,.1f} output, {total:,.1f} in all; a GPU {report.output_tokens_per_second_per_gpu:,.1f} "
        f"and {report.total_tokens_per_second_per_gpu:,.1f}"
    )
    if report.hit_rate is not None:
        yield f"Prompts: {report.tokens.prompt:,} tokens, {report.hit_rate:.1%} of them found in the prefix cache"


def _utilisation(report: LoadReport) -> Iterator[str]:
    if report.utilisation is None:
        return
    groups: dict[str, list[MeshUse]] = {}
    for mesh in report.meshes:
        groups.setdefault(mesh.role, []).append(mesh)
    shown = [_group(role, meshes, report.wall) for role, meshes in list(groups.items())[:_MOST_GROUPS]]
    yield from _wrapped(f"Utilisation: {report.utilisation:.1%}; {', '.join(shown)}")


def _group(role: str, meshes: Sequence[MeshUse], wall: float) -> str:
    shares = sorted(mesh.busy / wall for mesh in meshes)
    span = f"{shares[0]:.0%}" if len(shares) == 1 else f"{shares[0]:.0%} to {shares[-1]:.0%}"
    return f"{len(meshes)} {role} {span}"


def _cost(report: LoadReport) -> Iterator[str]:
    if report.dollars is not None:
        named = (("input", report.dollars.input), ("output", report.dollars.output), ("all", report.dollars.total))
        prices = ", ".join(f"{name} {_or_unknown(value, '.3f')}" for name, value in named)
        yield from _wrapped(f"$ per million tokens at {report.dollars.per_gpu_hour:g} $/GPU-hour: {prices}")
    if report.power is not None and report.joules_per_output_token is not None:
        yield from _wrapped(
            f"Joules per output token: {report.joules_per_output_token:,.2f} at {report.power.watts:g} W a GPU "
            f"({report.power.basis})"
        )


def _flips(report: LoadReport) -> Iterator[str]:
    if not report.flips:
        return
    left = len(report.flips) - _MOST_FLIPS
    yield f"Flips: {len(report.flips)}" + (f", the last {_MOST_FLIPS}" if left > 0 else "")
    for flip in report.flips[-_MOST_FLIPS:]:
        line = f"  {flip.t:,.1f} s mesh {flip.mesh}: {flip.before} to {flip.after}, {flip.reason}"
        yield line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _row(row: Distribution) -> str:
    return "".join(f"{1000 * value:12,.2f}" for value in (row.mean, row.p50, row.p90, row.p99))


def _parts(parts: Parts) -> str:
    first = "".join(f"{1000 * value:11,.2f}" for value in (parts.queue, parts.prefill, parts.host))
    return f"{first}{1000 * parts.handoff:16,.2f}"


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
