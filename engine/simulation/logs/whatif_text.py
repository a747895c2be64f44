"""A what-if as a page of text, at most 100 columns wide."""

from collections.abc import Iterator
from textwrap import wrap

from .whatif import WhatIf, figures_of

WIDTH = 100


def as_text(found: WhatIf) -> str:
    """Return the page, lines ended by a line feed."""
    return "".join(f"{line}\n" for line in _lines(found))


def _lines(found: WhatIf) -> Iterator[str]:
    run = found.happened.run
    yield from wrap(f"{run.workload}: {run.model} on {run.gpus} x {run.device}, {run.topology}, {run.policy}", WIDTH)
    yield f"{found.happened.requests:,} requests in {found.happened.wall:,.1f} s"
    yield from (line for note in found.notes for line in wrap(f"Note: {note}.", WIDTH, subsequent_indent="  "))
    yield ""
    other = found.otherwise
    heads = ["happened", "simulated", "error"]
    if other is not None:
        heads += [other.run.topology if len(other.run.topology) <= 20 else "otherwise", "change"]
    yield f"{'':28}" + "".join(f"{head:>{_WIDTHS[i]}}" for i, head in enumerate(heads))
    measured, again = figures_of(found.happened), figures_of(found.again)
    new = {} if other is None else figures_of(other)
    for name, value in measured.items():
        if value is None and new.get(name) is None:
            continue
        cells = [_shown(name, value), _shown(name, again[name]), _share(found.errors.get(name))]
        if other is not None:
            before, after = again[name], new[name]
            cells += [_shown(name, after), _share(after / before - 1 if before and after is not None else None)]
        unit = ", ms" if name.startswith(("TTFT", "TPOT", "E2E")) else ""
        yield f"{name + unit:28}" + "".join(f"{cell:>{_WIDTHS[i]}}" for i, cell in enumerate(cells))
    yield ""
    yield from wrap(
        "The error is of the run as it was, simulated, against what happened; expect no less of the rest."
        + ("" if other is None else f" The change is from that simulation to {_otherwise(found)}, simulated alike."),
        WIDTH,
    )


_WIDTHS = (14, 14, 11, 21, 11)


def _otherwise(found: WhatIf) -> str:
    assert found.otherwise is not None
    run, was = found.otherwise.run, found.happened.run
    return run.topology + (f" under {run.policy}" if run.policy != was.policy else "")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith(("TTFT", "TPOT", "E2E")):
        return f"{1000 * value:,.1f}"
    if name in ("utilisation", "SLO met, share"):
        return f"{value:.1%}"
    return f"{value:,.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
