"""Steps of a real run against what the cost model says of them: where a prediction is wrong, this tells whether it is
because of the steps."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from twinmesh.engine.protocol.actions import Decode
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.simulation.fit import predicted
from twinmesh.engine.simulation.measured import Beside, MeasuredStep, measured_step
from twinmesh.scripts.bench.belief_run import Ran


def step_ratios(costs: CostModel, runs: Iterable[Sequence[Ran]]) -> dict[str, Any]:
    """Return measured / predicted seconds of steps by program, alone and beside other meshes: count, share of all the
    steps' time, ratio of the sums, and percentiles of the ratios."""
    steps = [step for run in runs for step in measured(run)]
    total = sum(step.seconds for step in steps)
    groups = defaultdict(list)
    for step in steps:
        groups[f"{step.kind} {step.bucket} {'beside' if step.beside else 'alone'}"].append(step)
    found = {}
    for name, group in sorted(groups.items()):
        seconds = np.array([step.seconds for step in group])
        believed = np.array([predicted(costs, step) for step in group])
        found[name] = {
            "count": len(group),
            "share": float(seconds.sum() / total),
            "ratio": float(seconds.sum() / believed.sum()),
            "p10": float(np.percentile(seconds / believed, 10)),
            "p50": float(np.percentile(seconds / believed, 50)),
            "p90": float(np.percentile(seconds / believed, 90)),
        }
    return found


def measured(run: Sequence[Ran]) -> list[MeasuredStep]:
    """Return the steps of a run with what other meshes computed meanwhile."""
    by_mesh = defaultdict(list)
    for ran in sorted(run, key=lambda ran: ran.begun):
        by_mesh[ran.step.mesh].append(ran)
    ends = {mesh: [ran.ended for ran in rans] for mesh, rans in by_mesh.items()}
    found = []
    for mesh, rans in by_mesh.items():
        others = [other for other in by_mesh if other != mesh]
        for ran in rans:
            beside = [near for other in others for near in _overlapping(by_mesh[other], ends[other], ran)]
            found.append(measured_step(ran.step, ran.ended - ran.begun, _segments(ran, beside)))
    return found


def _overlapping(rans: Sequence[Ran], ends: Sequence[float], ran: Ran) -> list[Ran]:
    """Return those of a mesh's steps, in order, that ran at the same time as one of another mesh."""
    found = []
    for near in rans[bisect_left(ends, ran.begun) :]:
        if near.begun >= ran.ended:
            break
        found.append(near)
    return found


def _segments(ran: Ran, beside: Sequence[Ran]) -> list[Beside]:
    """Cut a step's time where what runs beside it changes; leave out where nothing does."""
    cuts = {ran.begun, ran.ended}
    for near in beside:
        cuts |= {min(max(t, ran.begun), ran.ended) for t in (near.begun, near.ended)}
    ordered, found = sorted(cuts), []
    for begin, end in zip(ordered, ordered[1:], strict=False):
        running = [near for near in beside if near.begun <= begin and near.ended >= end]
        decodes = sum(isinstance(near.step, Decode) for near in running)
        if running and end > begin:
            found.append(Beside(end - begin, len(running) - decodes, decodes))
    return found
