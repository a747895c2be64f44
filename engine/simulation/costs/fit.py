"""Coefficients of a cost model from measured steps and transfers: a pure function of what was measured.

Each program's costs are fitted on their own, by least squares without negative coefficients (Lawson and Hanson 1974,
`scipy.optimize.nnls`), so that they give the mean of what was measured, which is what many steps add up to. Errors
count relative to what is expected of a step, by the fit before: a slow step would decide alone if they were absolute,
and relative to what was measured those that happened to be quick would, and pull the mean down by twice the variance
(quasi-likelihood with variance as the square of the mean: McCullagh and Nelder 1989, chapter 9). What stalled counts
for no more than `_STALLED` times the expected. Cold runs are the caller's to leave out (`measured.without_cold`).

First come the steps that ran alone, on a mesh that had work before them; then, from the others, by how much other
meshes slow a step down, as `ProgramCost.slowdown` has it, and what the host adds to a step of an idle mesh; then all
steps, with what the host has added and what others have slowed down taken out. A program with too few steps of the
first sort is slowed down as those of its kind that have enough.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares, nnls

from ...scheduler.cost_model import CostModel, HostCost, LinkCost, ProgramCost
from .measured import Entered, HostWork, Kind, MeasuredStep, MeasuredTransfer

_STALLED = 4.0  # times the expected, or beyond
_TURNS = 4  # of fitting a program's costs alone, and its slowdown
_ROUNDS = 8  # of fitting to what the fit before expects
_ALONE = 0.02  # of a step's time may be beside others for it to count as alone
_ENOUGH = 4  # steps for a program's own costs, and for its own slowdown
_LEAST_WORK = 0.2  # of the seconds of a step; what the host takes is no more than the rest
_WIDEST = 0.9  # spread; nothing can be said of steps that vary more
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
    alone = np.array([_alone(_program(costs, step), step) for step in behind])
    work = np.minimum([_work(step, _slowdown(_program(costs, step))) for step in behind], _STALLED * alone)
    gather, scatter = _nnls(sizes / alone[:, None], work / alone - 1.0)
    return msgspec.structs.replace(costs.link, gather=gather, scatter=scatter)


def _slowdown(program: ProgramCost) -> Slowdown:
    return Slowdown(program.beside_prefill, program.beside_decode)


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
    fixed, byte = _fit_means(
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
        arrival, token = _fit_means(lengths, np.array([one.seconds for one in entered]))
    if work:
        counts = np.array([[float(one.steps), one.rows, one.requests] for one in work])
        step, row, _ = _fit_means(counts, np.array([one.seconds for one in work]))
    return HostCost(arrival, token, step, row, mean_without_stalls(lags))


def predicted(costs: CostModel, step: MeasuredStep) -> float:
    """Return the seconds that a step should have taken, beside what it ran beside."""
    program, link = _program(costs, step), costs.link
    idle = 0.0 if step.is_queued else costs.host.step + costs.host.idle
    alone = _alone(program, step) + link.gather * step.gathered + link.scatter * step.scattered
    work = _work(step, _slowdown(program))
    return idle + alone * step.seconds / work


def spread(costs: CostModel, steps: Sequence[MeasuredStep]) -> float:
    """Return the standard deviation of the logarithm of step times around what the costs predict, without stalls."""
    if len(steps) < _ENOUGH:
        return 0.0
    logs = np.log([step.seconds / predicted(costs, step) for step in steps])
    kept = logs[np.abs(logs) < math.log(_STALLED)]
    return min(float(np.std(kept)), _WIDEST) if len(kept) else 0.0


def _program(costs: CostModel, step: MeasuredStep) -> ProgramCost:
    return {"prefill": costs.prefill, "decode": costs.decode, "fused": costs.fused}[step.kind][step.bucket]


# ---- one program


def _fit_program(steps: Sequence[MeasuredStep], idle: float, of_kind: Slowdown) -> ProgramCost:
    """Fit a program's costs alone to its plain steps, then its slowdown to those beside others, then both by turns to
    all of them; with too few plain steps, the slowdown is that of its kind."""
    plain, beside = _plain(steps), [step for step in steps if not _is_alone(step)]
    is_known = len(plain) >= _ENOUGH and len(beside) >= _ENOUGH
    base, own = _fit_base(plain, [step.seconds for step in plain]), of_kind
    for _ in range(_TURNS):
        if is_known:
            own = _fit_slowdown([(step, _alone(base, step)) for step in beside], idle)
        base = _fit_base(steps, [_work(step, own, idle) for step in steps])
    return msgspec.structs.replace(base, beside_prefill=own.prefill, beside_decode=own.decode)


def _around(programs: Mapping[tuple[Kind, int], Sequence[MeasuredStep]]) -> _Around:
    """Find what holds for all programs, from those of which some steps are plain and some are not."""
    idle: list[tuple[float, float]] = []
    beside: dict[Kind, list[tuple[MeasuredStep, float]]] = defaultdict(list)
    for (kind, _), steps in sorted(programs.items()):
        plain = _plain(steps)
        if len(plain) >= _ENOUGH:
            base = _fit_base(plain, [step.seconds for step in plain])
            expected = [(step, _alone(base, step)) for step in steps]
            idle += [(step.seconds, alone) for step, alone in expected if _is_alone(step) and not step.is_queued]
            beside[kind] += [(step, alone) for step, alone in expected if not _is_alone(step)]
    added = _fit_idle(idle)
    return _Around(
        added, {kind: _fit_slowdown(found, added) for kind, found in beside.items() if len(found) >= _ENOUGH}
    )


def _fit_idle(steps: Sequence[tuple[float, float]]) -> float:
    """Fit what is added to steps, given what each took and should have taken; a long one says less of it."""
    if len(steps) < _ENOUGH:
        return 0.0
    taken, alone = np.array(steps).T
    added = np.minimum(taken, _STALLED * alone) - alone
    return max(0.0, float(np.average(added, weights=alone**-2)))


def _plain(steps: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    return [step for step in steps if step.is_queued and _is_alone(step)]


def _fit_base(steps: Sequence[MeasuredStep], seconds: Sequence[float]) -> ProgramCost:
    """Fit what the steps cost alone, given the seconds that each would have taken alone."""
    if not steps:
        return ProgramCost(0.0)
    rows = [[step.passes, step.chunks, step.pairs, step.rows, step.context] for step in steps]
    fixed, chunk, pair, row, context = _fit_means(np.array(rows, float), np.array(seconds, float))
    return ProgramCost(fixed, chunk, pair, row, context)


def _fit_slowdown(steps: Sequence[tuple[MeasuredStep, float]], idle: float) -> Slowdown:
    """Fit the slowdown with which the steps should have taken what they did, in the mean, given what each takes alone.

    With a step's own time divided into parts beside others, what it should have taken is what it takes alone, divided
    by the share of its time that is left where each part counts for its work alone (`_work`).
    """
    own = [_work(step, Slowdown(), idle) for step, _ in steps]  # seconds without what the host adds
    taken = [seconds / alone for seconds, (_, alone) in zip(own, steps, strict=True)]  # times as long as alone

    def errors(shares: np.ndarray) -> np.ndarray:
        slowdown = Slowdown(*shares.tolist())
        expected = [seconds / _work(step, slowdown, idle) for seconds, (step, _) in zip(own, steps, strict=True)]
        return np.minimum(taken, _STALLED * np.array(expected)) - expected

    with_prefill = any(part.prefills for step, _ in steps for part in step.beside)
    with_decode = any(part.decodes for step, _ in steps for part in step.beside)
    start = np.array([0.5 * with_prefill, 0.5 * with_decode])
    prefill, decode = (float(share) for share in least_squares(errors, start, bounds=(0.0, _SLOWEST)).x)
    # Beside what it never ran, a step is not undisturbed: it shares the same cores and memory.
    return Slowdown(prefill if with_prefill else decode, decode if with_decode else prefill)


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


def mean_without_stalls(seconds: Sequence[float]) -> float:
    """Return the mean, of which what stalled counts for no more than it does in fits; 0 of nothing."""
    if not len(seconds):
        return 0.0
    return float(np.mean(np.minimum(seconds, _STALLED * float(np.median(seconds)))))


def _fit_means(rows: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Solve rows @ x = seconds for x >= 0, so that x gives the means of what rows that are alike have taken."""
    usable = seconds > 0
    rows, seconds = rows[usable], seconds[usable]
    expected, found = seconds, [0.0] * rows.shape[1]
    for _ in range(_ROUNDS):
        found = _nnls(rows / expected[:, None], np.minimum(seconds / expected, _STALLED))
        expected = np.maximum(rows @ found, seconds / _STALLED**2)  # never 0, even where the fit says so
    return found


def _nnls(rows: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve rows @ x = wanted for x >= 0 by least squares, whatever the units of the columns."""
    columns = np.abs(rows).max(axis=0, initial=0.0)
    columns[columns == 0] = 1.0  # a count of nothing: its coefficient stays 0
    return [float(value) for value in nnls(rows / columns, wanted)[0] / columns]
