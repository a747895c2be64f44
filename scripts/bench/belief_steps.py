"""Steps of a real run against what the cost model says of them: where a prediction is wrong, this tells whether it is
because of the steps."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.simulation.costs.fit import predicted
from twinmesh.engine.simulation.costs.overlaps import Ran, measured_steps


def step_ratios(costs: CostModel, runs: Iterable[Sequence[Ran]]) -> dict[str, Any]:
    """Return measured / predicted seconds of steps by program, alone and beside other meshes: count, share of all the
    steps' time, ratio of the sums, and percentiles of the ratios."""
    steps = [step for run in runs for step in measured_steps(run)]
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
