"""Coefficients of a cost model from measured steps and transfers: a pure function of what was measured.

Each program's costs are fitted on their own, by least squares without negative coefficients (Lawson and Hanson 1974,
`scipy.optimize.nnls`). Rows are divided by what was measured, so that relative errors count: a slow step would
otherwise decide alone. Outliers (a stalled host, a page fault) are weighed down by Huber's weights (1964): after each
fit a step whose relative error is beyond `_HUBER` times the usual one counts for as much less. Cold runs are the
caller's to leave out (`measured.without_cold`).

First come the steps that ran alone, on a mesh that had work before them; then, from the others, by how much other
meshes slow a step down, as `ProgramCost.slowdown` has it, and what the host adds to a step of an idle mesh. A program
with too few steps of the first sort is fitted to all of its steps, with what the host has added and what others have
slowed down taken out as it is with programs that have enough.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares, nnls

from ...scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from .measured import Entered, HostWork, Kind, MeasuredStep, MeasuredTransfer

_HUBER = 1.345  # times the scale of errors: 95 % as efficient as plain least squares where they are normal
_ROUNDS = 8  # of weighing outliers
_LEAST_SCALE = 0.002  # of relative errors; all errors below it count alike
_ALONE = 0.02  # of a step's time may be beside others for it to count as alone
_ENOUGH = 4  # steps for a program's own costs, and for its own slowdown
_LEAST_WORK = 0.2  # of the seconds of a step; what the host takes is no more than the rest
_SLOWEST = 16.0  # a mesh beside another takes no longer than so many times as long


class Slowdown(NamedTuple):
    """By how much longer a step takes, as a share, for each other mesh that computes."""

    prefill: float = 0.0
    decode: float = 0.0


class _Around(NamedTuple):
    """What is known of all programs together."""

    idle: float  # seconds that the host adds to a step of an idle mesh
    slowdowns: Mapping[Kind, Slowdown]


def fit_costs(
    steps: Sequence[MeasuredStep], transfers: Sequence[MeasuredTransfer] = (), host: HostCost | None = None
) -> CostModel:
    """Fit a cost model to measured steps, with the programs that are among them (`fill.py` adds others).

    `host` is what the host's threads were seen to take; what a step of an idle mesh takes longer than that is `idle`.

    Raises:
        ValueError: nothing was measured.
    """
    if not steps:
        raise ValueError("no steps were measured: there is nothing to fit costs to.")
    programs = _programs(steps)
    around = _around(programs)
    found: dict[Kind, dict[int, ProgramCost]] = {"prefill": {}, "decode": {}, "fused": {}}
    for (kind, bucket), own in sorted(programs.items()):
        found[kind][bucket] = _fit_program(own, around.idle, around.slowdowns.get(kind, Slowdown()))
    link, seen = fit_link(transfers), _host(host, around.idle)
    costs = CostModel(found["prefill"], found["decode"], found["fused"], link, seen)
    return msgspec.structs.replace(costs, link=_with_copies(costs, steps))


def _with_copies(costs: CostModel, steps: Sequence[MeasuredStep]) -> LinkCost:
    """Fit what steps took longer that came behind a gather or a scatter."""
    behind = [step for step in steps if step.is_queued and (step.gathered or step.scattered)]
    if len(behind) < _ENOUGH:
        return costs.link
    sizes = np.array([[step.gathered, step.scattered] for step in behind], float)
    gather, scatter = _huber_nnls(sizes, np.array([_longer(costs, step) for step in behind]))
    return msgspec.structs.replace(costs.link, gather=gather, scatter=scatter)


def _longer(costs: CostModel, step: MeasuredStep) -> float:
    """Return by how many seconds a step took longer than its program would have, beside nobody."""
    program = _program(costs, step)
    return _work(step, Slowdown(program.beside_prefill, program.beside_decode)) - _alone(program, step)


def _programs(steps: Sequence[MeasuredStep]) -> dict[tuple[Kind, int], list[MeasuredStep]]:
    """Group steps by program, without those that came behind a gather or a scatter, unless there are hardly others."""
    all_steps: dict[tuple[Kind, int], list[MeasuredStep]] = defaultdict(list)
    for step in steps:
        all_steps[step.kind, step.bucket].append(step)
    found = {}
    for program, own in all_steps.items():
        unmoved = [step for step in own if not step.gathered and not step.scattered]
        found[program] = unmoved if len(unmoved) >= _ENOUGH else own
    return found


def _host(seen: HostCost | None, idle: float) -> HostCost:
    if seen is None:
        return HostCost(idle=idle)
    step = min(seen.step, idle) if idle else seen.step  # of its CPU time, some passes while the device computes
    return msgspec.structs.replace(seen, step=step, idle=max(0.0, idle - step))


def fit_link(transfers: Sequence[MeasuredTransfer]) -> LinkCost:
    """Fit what a transfer costs; nothing where none was measured."""
    if not transfers:
        return LinkCost(0.0, 0.0)
    fixed, byte = _robust_nnls(
        np.array([[1.0, transfer.size] for transfer in transfers]),
        np.array([transfer.seconds for transfer in transfers]),
    )
    return LinkCost(fixed, byte)


def fit_host(entered: Sequence[Entered], work: Sequence[HostWork], lags: Sequence[float] = ()) -> HostCost:
    """Fit what the host takes for a request to come in, and for each step; nothing where none was seen.

    `lags` are seconds from the ends of steps until their tokens were taken in.
    """
    arrival = token = step = row = 0.0
    if entered:
        lengths = np.array([[1.0, one.prompt_len] for one in entered])
        arrival, token = _robust_nnls(lengths, np.array([one.seconds for one in entered]))
    if work:
        counts = np.array([[float(one.steps), one.rows, one.requests] for one in work])
        step, row, _ = _robust_nnls(counts, np.array([one.seconds for one in work]))
    return HostCost(arrival, token, step, row, float(np.median(lags)) if len(lags) else 0.0)


def predicted(costs: CostModel, step: MeasuredStep) -> float:
    """Return the seconds that a step should have taken, beside what it ran beside."""
    program, link = _program(costs, step), costs.link
    idle = 0.0 if step.is_queued else costs.host.step + costs.host.idle
    alone = _alone(program, step) + link.gather * step.gathered + link.scatter * step.scattered
    work = _work(step, Slowdown(program.beside_prefill, program.beside_decode))
    return idle + alone * step.seconds / work


def _program(costs: CostModel, step: MeasuredStep) -> ProgramCost:
    return {"prefill": costs.prefill, "decode": costs.decode, "fused": costs.fused}[step.kind][step.bucket]


# ---- one program


def _fit_program(steps: Sequence[MeasuredStep], idle: float, of_kind: Slowdown) -> ProgramCost:
    plain = _plain(steps)
    if len(plain) < _ENOUGH:
        return _fit_base(steps, [_work(step, of_kind, idle) for step in steps], of_kind)
    base = _fit_base(plain, [step.seconds for step in plain], of_kind)
    beside = [step for step in steps if not _is_alone(step)]
    own = _fit_slowdown([(step, _alone(base, step)) for step in beside], idle) if len(beside) >= _ENOUGH else of_kind
    return msgspec.structs.replace(base, beside_prefill=own.prefill, beside_decode=own.decode)


def _around(programs: Mapping[tuple[Kind, int], Sequence[MeasuredStep]]) -> _Around:
    """Find what holds for all programs, from those of which some steps are plain and some are not."""
    added: list[float] = []
    beside: dict[Kind, list[tuple[MeasuredStep, float]]] = defaultdict(list)
    for (kind, _), steps in sorted(programs.items()):
        plain = _plain(steps)
        if len(plain) >= _ENOUGH:
            base = _fit_base(plain, [step.seconds for step in plain], Slowdown())
            expected = [(step, _alone(base, step)) for step in steps]
            added += [step.seconds - alone for step, alone in expected if _is_alone(step) and not step.is_queued]
            beside[kind] += [(step, alone) for step, alone in expected if not _is_alone(step)]
    idle = max(0.0, float(np.median(added))) if len(added) >= _ENOUGH else 0.0
    return _Around(idle, {kind: _fit_slowdown(found, idle) for kind, found in beside.items() if len(found) >= _ENOUGH})


def _plain(steps: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    return [step for step in steps if step.is_queued and _is_alone(step)]


def _fit_base(steps: Sequence[MeasuredStep], seconds: Sequence[float], slowdown: Slowdown) -> ProgramCost:
    """Fit what the steps cost alone, given the seconds that each would have taken alone."""
    rows = [[step.passes, step.chunks, step.pairs, step.rows, step.context] for step in steps]
    fixed, chunk, pair, row, context = _robust_nnls(np.array(rows, float), np.array(seconds, float))
    return ProgramCost(fixed, chunk, pair, row, context, slowdown.prefill, slowdown.decode)


def _fit_slowdown(steps: Sequence[tuple[MeasuredStep, float]], idle: float) -> Slowdown:
    """Fit the slowdown that leaves of each step's time what it should have taken alone, which is given with it."""

    def errors(shares: np.ndarray) -> np.ndarray:
        slowdown = Slowdown(*shares.tolist())
        return np.array([_work(step, slowdown, idle) / alone - 1.0 for step, alone in steps])

    with_prefill = any(part.prefills for step, _ in steps for part in step.beside)
    with_decode = any(part.decodes for step, _ in steps for part in step.beside)
    start = np.array([0.5 * with_prefill, 0.5 * with_decode])
    found = least_squares(errors, start, bounds=(0.0, _SLOWEST), loss="soft_l1", f_scale=0.05).x
    return Slowdown(float(found[0]) * with_prefill, float(found[1]) * with_decode)


def _is_alone(step: MeasuredStep) -> bool:
    return sum(part.seconds for part in step.beside) <= _ALONE * step.seconds


def _work(step: MeasuredStep, slowdown: Slowdown, idle: float = 0.0) -> float:
    """Return the seconds that the step would have taken alone on a mesh with work before it, if the host adds `idle` to
    one of an idle mesh, and others slow it down by so much."""
    shared = sum(part.seconds for part in step.beside)
    slowed = [
        part.seconds / (1.0 + slowdown.prefill * part.prefills + slowdown.decode * part.decodes) for part in step.beside
    ]
    work = step.seconds - shared + sum(slowed)
    return work if step.is_queued else max(_LEAST_WORK * work, work - idle)


def _alone(program: ProgramCost, step: MeasuredStep) -> float:
    return (
        program.fixed * step.passes
        + program.chunk * step.chunks
        + program.pair * step.pairs
        + program.row * step.rows
        + program.context * step.context
    )


def _robust_nnls(rows: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Solve rows @ x = seconds for x >= 0, so that relative errors are small and outliers count for less."""
    usable = seconds > 0
    return _huber_nnls(rows[usable] / seconds[usable, None], np.ones(int(usable.sum())))


def _huber_nnls(rows: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve rows @ x = wanted for x >= 0, so that outliers count for less."""
    columns = np.abs(rows).max(axis=0, initial=0.0)
    columns[columns == 0] = 1.0  # a count of nothing: its coefficient stays 0
    scaled = rows / columns
    least = _LEAST_SCALE * float(np.median(np.abs(wanted))) if len(wanted) else 0.0
    weights, found = np.ones(len(rows)), np.zeros(rows.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        found = nnls(scaled * root[:, None], wanted * root)[0]
        errors = np.abs(scaled @ found - wanted)
        scale = max(1.4826 * float(np.median(errors)), least, 1e-12) if len(errors) else 1.0
        weights = np.minimum(1.0, _HUBER * scale / np.maximum(errors, 1e-15))
    return [float(value) for value in found / columns]
