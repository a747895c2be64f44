"""What a search of a topology found, as a page of text and as plain data for other programs."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import msgspec

from ...metrics.distribution import Distribution
from ...metrics.report_text import WIDTH
from ...protocol.service import SLO
from .search import Answer, Outcome

VERSION = 1
FORMAT = "twinmesh plan"
_MOST_SHOWN = 5  # runners-up, and what does not fit


def as_text(answer: Answer) -> str:
    """Return the page, lines ended by a line feed."""
    lines = [*_verdict(answer), "", *_expected(answer), "", *_runners_up(answer), *_changes(answer), *_refused(answer)]
    return "".join(f"{line}\n" for line in lines)


def as_data(answer: Answer) -> dict[str, Any]:
    """Return the same for JSON: every simulated choice with its whole report, the recommended first."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": answer.problem.name,
        "device": answer.problem.source.device,
        "devices": answer.problem.devices,
        "slo": msgspec.to_builtins(answer.problem.slo),
        "is_met": answer.best.is_met,
        "outcomes": [_outcome(outcome) for outcome in answer.outcomes],
        "changes": [{"what": change.what} | _outcome(change.outcome) for change in answer.changes],
        "refused": [{"topology": str(choice), "why": why} for choice, why in answer.refused],
        "left_out": answer.left_out,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report
    return {
        "topology": outcome.choice.topology,
        "chunk": outcome.choice.chunk,
        "idle": outcome.choice.idle,
        "is_planned": outcome.choice.is_planned,
        "is_met": outcome.is_met,
        "share": outcome.share,
        "ttft_at_percentile": outcome.ttft,
        "tpot_at_percentile": outcome.tpot,
        "output_tokens_per_second_per_gpu": report.output_tokens_per_second_per_gpu,
        "dollars": msgspec.to_builtins(report.dollars),
        "joules_per_output_token": report.joules_per_output_token,
        "report": msgspec.to_builtins(report),
    }


def _verdict(answer: Answer) -> Iterator[str]:
    best, problem = answer.best, answer.problem
    where = f"{problem.name} on {problem.devices} x {problem.source.device}"
    target = _target(problem.slo)
    if best.is_met:
        yield from _wrapped(f"{where}: {_named(best)} meets {target}.")
    else:
        yield from _wrapped(
            f"{where}: no topology meets {target}; the best is {_named(best)}, with which {best.share:.1%} of requests "
            "do."
        )
    if best.choice.idle:
        verb = "is" if best.choice.idle == 1 else "are"
        yield from _wrapped(
            f"{best.choice.idle} of the {problem.devices} devices {verb} idle, since tp {best.choice.tp} does not "
            "divide them; costs and tokens a GPU count all."
        )
    if best.choice.meshes == 1:
        yield from _wrapped("It is one mesh, so there are no roles to plan: prefill and decode share it.")


def _named(outcome: Outcome) -> str:
    return f"{outcome.choice}{', its roles planned' if outcome.choice.is_planned else ''}"


def _target(slo: SLO) -> str:
    times = [f"{name} {value:g} ms" for name, value in (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms)) if value]
    return f"{', '.join(times)} for {slo.percentile:g} % of requests"


def _expected(answer: Answer) -> Iterator[str]:
    report = answer.best.report
    notes = "".join(f"; {note}" for note in report.run.notes)
    yield from _wrapped(f"Expected, of {report.requests:,} requests of {report.run.workload}, simulated{notes}:")
    yield f"{'ms':6}{'P50':>12}{'P90':>12}{'P99':>12}"
    yield from (f"{n:6}{_row(row)}" for n, row in (("TTFT", report.ttft), ("TPOT", report.tpot)) if row is not None)
    if report.goodput is not None:
        yield from _wrapped(
            f"Goodput {report.goodput.per_second:,.2f} requests/s, {report.goodput.share:.2%} of all; "
            f"{report.output_tokens_per_second_per_gpu:,.1f} output tokens/s a GPU, "
            f"{report.total_tokens_per_second_per_gpu:,.1f} in all"
        )
    if report.dollars is not None and report.dollars.output is not None and report.dollars.total is not None:
        yield from _wrapped(
            f"$ per million tokens at {report.dollars.per_gpu_hour:g} $/GPU-hour: {report.dollars.output:.3f} for "
            f"output, {report.dollars.total:.3f} over all"
        )
    if report.power is not None and report.joules_per_output_token is not None:
        yield from _wrapped(
            f"{report.joules_per_output_token:,.2f} joules per output token at {report.power.watts:g} W a GPU "
            f"({report.power.basis})"
        )


def _row(row: Distribution) -> str:
    return "".join(f"{1000 * value:12,.2f}" for value in (row.p50, row.p90, row.p99))


def _runners_up(answer: Answer) -> Iterator[str]:
    others = answer.outcomes[1:]
    if others:
        yield "Runners-up, with the share of requests that meet the target, and TTFT and TPOT"
        yield f"at its percentile ({len(others)} simulated, {answer.left_out} predicted to be worse and left out):"
    for outcome in others[:_MOST_SHOWN]:
        yield f"  {outcome.choice!s:46}{outcome.share:8.2%}{_ms(outcome.ttft):>12}{_ms(outcome.tpot):>12}"


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1000 * seconds:,.1f} ms"


def _changes(answer: Answer) -> Iterator[str]:
    if not answer.changes:
        if answer.best.is_met:
            yield from _wrapped("Fewer devices were tried, and miss the target.")
        else:
            yield from _wrapped("More devices, a later target and less load were tried, and none of them meets it.")
    for change in answer.changes:
        outcome = change.outcome
        shown = f"with {change.what} ({_named(outcome)}): {outcome.share:.1%}"
        if answer.best.is_met:
            saved = 1 - outcome.report.run.gpus / answer.problem.devices
            yield from _wrapped(f"The target is also met {shown}, for {saved:.0%} less.")
        else:
            yield from _wrapped(f"It would be met {shown}.")


def _refused(answer: Answer) -> Iterator[str]:
    reasons = dict.fromkeys(why for _, why in answer.refused)
    yield from (line for why in list(reasons)[:_MOST_SHOWN] for line in _wrapped(f"Does not fit: {why}"))


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)
