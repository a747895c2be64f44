"""The loads of `planner.py`: how much work a request is, and requests whose mix of prompt and answer changes.

A load is a share of what the meshes could do if none ever waited: the seconds that a request takes of a mesh, its
prompt in full steps and its answer as one row of `ROWS` in a step, times requests per second, over the number of
meshes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from twinmesh.engine.scheduler.cost_model import CostModel, pairs
from twinmesh.engine.simulation.loads.scaling import stretched
from twinmesh.engine.simulation.loads.traces import read_trace
from twinmesh.engine.simulation.workload import WorkRequest

ROWS = 32  # that share a decode step

# What shifts in a day: lengths of prompts and answers by hour of the day, from reading to writing and back.
READING, MIXED, WRITING = (9000, 100), (4000, 500), (500, 1200)


class Phase(NamedTuple):
    """A part of a load: from when to when, and what the best split of it is looked for by."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Load:
    """Requests, and the phases that an oracle knows."""

    name: str
    requests: list[WorkRequest]
    phases: list[Phase]


def mesh_seconds(costs: CostModel, request: WorkRequest) -> float:
    """Return the seconds that a request takes of one mesh."""
    chunk = max(costs.prefill)
    program = costs.prefill[chunk]
    decode = costs.decode[min(bucket for bucket in costs.decode if bucket >= min(ROWS, max(costs.decode)))]
    steps = request.prompt_len / chunk
    prompt = steps * (program.fixed + program.chunk) + program.pair * pairs(0, request.prompt_len)
    context = decode.context * (request.prompt_len + request.output_len / 2)
    return prompt + request.output_len * (decode.fixed / ROWS + decode.row + context)


def steady(path: str, name: str, costs: CostModel, meshes: int, share: float, count: int) -> Load:
    """Take the first requests of a trace, in its own times stretched to a share of what the meshes can do."""
    found = list(islice(read_trace(path).requests, count))
    found = [WorkRequest(r.prompt_len, r.output_len, r.time, blocks=r.blocks) for r in found]
    work = sum([mesh_seconds(costs, request) for request in found])
    found = stretched(found, work / (share * meshes) / found[-1].time)
    return Load(name, found, [Phase("all", 0.0, found[-1].time)])


def made(
    name: str, costs: CostModel, meshes: int, share: float, parts: Sequence[tuple[float, float, tuple[int, int]]]
) -> Load:
    """Make a load of parts, each of so many seconds, so many times the share, and with lengths around these: a share of
    0.5 to 1.5 of each, drawn for prompt and answer apart. Requests come as Poisson would have them."""
    random, begin = np.random.default_rng(0), 0.0
    requests, phases = list[WorkRequest](), list[Phase]()
    for number, (seconds, factor, lengths) in enumerate(parts):
        each = mesh_seconds(costs, WorkRequest(*lengths, 0.0))
        count = random.poisson(factor * share * meshes / each * seconds)
        times = np.sort(random.random(count)) * seconds + begin
        sizes = np.maximum(1, (random.uniform(0.5, 1.5, (count, 2)) * lengths).astype(int))
        requests += [WorkRequest(int(p), int(o), float(t)) for (p, o), t in zip(sizes, times, strict=True)]
        phases.append(Phase(f"{name} {number}", begin, begin + seconds))
        begin += seconds
    return Load(name, requests, phases)


def spike(costs: CostModel, meshes: int, share: float, seconds: float) -> Load:
    """Ten times the requests for a twentieth of the time, after a quarter."""
    return made("spike", costs, meshes, share, [
        (seconds / 4, 1.0, MIXED), (seconds / 20, 10.0, MIXED), (seconds * (1 - 1 / 4 - 1 / 20), 1.0, MIXED),
    ])  # fmt: skip


def day(costs: CostModel, meshes: int, share: float, seconds: float) -> Load:
    """A day in so many seconds: writing, mixed, reading, mixed, writing, each a fifth of it, at one share all along."""
    return made("day", costs, meshes, share, [(seconds / 5, 1.0, x) for x in (WRITING, MIXED, READING, MIXED, WRITING)])
