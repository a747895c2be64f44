"""The loads of `planner.py`: how much work a request is, and requests whose mix of prompt and answer changes.

A load is a share of what the meshes could do if none ever waited: the seconds that a request takes of a mesh, its
prompt in full steps and its answer as one of as many rows of a step as memory holds and the TPOT target allows, times
requests per second, over the number of meshes. (A fixed 32 rows, as it was at first, made parts of a day that write a
third of the load that the same share is where it reads.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.scheduler.cost_model import CostModel, pairs
from twinmesh.engine.simulation.loads.scaling import stretched
from twinmesh.engine.simulation.loads.traces import read_trace
from twinmesh.engine.simulation.simulator import SimulatedEngine
from twinmesh.engine.simulation.workload import WorkRequest

READING, MIXED, WRITING = (9000, 100), (4000, 500), (500, 1200)  # lengths of prompts and answers
_LEAST = 1 / 9  # of the work of a day, that is either kind
_PARTS = 6  # of a day, that an oracle knows


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


@dataclass(frozen=True)
class Meshes:
    """Meshes that are all alike, and what is asked of them."""

    engine: SimulatedEngine
    slo: SLO

    @property
    def costs(self) -> CostModel:
        """Return the costs of one."""
        return self.engine.costs_of_meshes[0]

    @property
    def count(self) -> int:
        """Return how many there are."""
        return len(self.engine.pools)

    def rows(self, prompt: float, output: float) -> float:
        """Return the most requests of these lengths that one decodes together, in time and in its memory."""
        config, context = self.engine.config, prompt + output / 2
        seats = min(config.max_num_seqs, config.kv_tokens(self.engine.pools[0].pages) / context)
        target = (self.slo.tpot_ms or float("inf")) / 1000
        decode = self.costs.decode.items()
        return max(1.0, *(min(most, seats, (target - x.fixed) / (x.row + x.context * context)) for most, x in decode))

    def seconds(self, request: WorkRequest, rows: float) -> float:
        """Return the seconds that a request takes of one of them, where so many decode together."""
        chunk = max(self.costs.prefill)
        program, decode = self.costs.prefill[chunk], self.costs.decode[min(b for b in self.costs.decode if b >= rows)]
        steps = request.prompt_len / chunk
        prompt = steps * (program.fixed + program.chunk) + program.pair * pairs(0, request.prompt_len)
        context = decode.context * (request.prompt_len + request.output_len / 2)
        return prompt + request.output_len * (decode.fixed / rows + decode.row + context)


def steady(path: str, name: str, meshes: Meshes, share: float, count: int) -> Load:
    """Take the first requests of a trace, in its own times stretched to a share of what the meshes can do."""
    found = list(islice(read_trace(path).requests, count))
    found = [WorkRequest(r.prompt_len, r.output_len, r.time, blocks=r.blocks) for r in found]
    rows = meshes.rows(sum([r.prompt_len for r in found]) / count, sum([r.output_len for r in found]) / count)
    work = sum([meshes.seconds(request, rows) for request in found])
    found = stretched(found, work / (share * meshes.count) / found[-1].time)
    return Load(name, found, [Phase("all", 0.0, found[-1].time)])


def made(name: str, meshes: Meshes, share: float, parts: Sequence[tuple[float, float, tuple[int, int]]]) -> Load:
    """Make a load of parts, each of so many seconds, so many times the share, and with lengths around these: a share of
    0.5 to 1.5 of each, drawn for prompt and answer apart. Requests come as Poisson would have them."""
    random, begin = np.random.default_rng(0), 0.0
    requests, phases = list[WorkRequest](), list[Phase]()
    for number, (seconds, factor, lengths) in enumerate(parts):
        each = meshes.seconds(WorkRequest(*lengths, 0.0), meshes.rows(*lengths))
        count = random.poisson(factor * share * meshes.count / each * seconds)
        times = np.sort(random.random(count)) * seconds + begin
        sizes = np.maximum(1, (random.uniform(0.5, 1.5, (count, 2)) * lengths).astype(int))
        requests += [WorkRequest(int(p), int(o), float(t)) for (p, o), t in zip(sizes, times, strict=True)]
        phases.append(Phase(f"{name} {number}", begin, begin + seconds))
        begin += seconds
    return Load(name, requests, phases)


def spike(meshes: Meshes, share: float, seconds: float) -> Load:
    """Ten times the requests for a twentieth of the time, after a quarter."""
    return made("spike", meshes, share, [
        (seconds / 4, 1.0, MIXED), (seconds / 20, 10.0, MIXED), (seconds * (1 - 1 / 4 - 1 / 20), 1.0, MIXED),
    ])  # fmt: skip


def jumps(meshes: Meshes, share: float, seconds: float) -> Load:
    """Writing, mixed, reading, mixed, writing, each for a fifth of the time, at one share all along."""
    parts = [(seconds / 5, 1.0, lengths) for lengths in (WRITING, MIXED, READING, MIXED, WRITING)]
    return made("jumps", meshes, share, parts)


def day(meshes: Meshes, share: float, seconds: float) -> Load:
    """A day in so many seconds, at one share all along: of the meshes' work that part is prompts to be read which goes
    from a ninth to eight ninths and back, as a cosine does; the rest is answers to be written."""
    random = np.random.default_rng(0)
    works = [meshes.seconds(WorkRequest(*lengths, 0.0), meshes.rows(*lengths)) for lengths in (READING, WRITING)]
    most = share * meshes.count / min(works)  # requests a second, more than ever come
    times = np.sort(random.random(random.poisson(most * seconds))) * seconds
    reads = 0.5 - (0.5 - _LEAST) * np.cos(2 * np.pi * times / seconds)
    rates = np.array([reads / works[0], (1 - reads) / works[1]]) * share * meshes.count  # [kind, request]
    drawn, factors = random.random(len(times)) * most, random.uniform(0.5, 1.5, (len(times), 2))
    requests = list[WorkRequest]()
    for t, draw, factor, read, write in zip(times.tolist(), drawn, factors, *rates, strict=True):
        if draw < read + write:
            prompt, output = np.maximum(1, (factor * (READING if draw < read else WRITING)).astype(int)).tolist()
            requests.append(WorkRequest(prompt, output, t))
    parts = [seconds * k / _PARTS for k in range(_PARTS + 1)]
    return Load("day", requests, [Phase(f"day {k}", *ends) for k, ends in enumerate(pairwise(parts))])
