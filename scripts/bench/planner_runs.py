"""What `planner.py` runs: who takes part in a comparison on one load, and what became of the requests.

Each run has a name, under which its figures are kept, so that a comparison can be made in parts. Search spaces are
stated here and nowhere else: `Cell.splits`, `Cell.both`, `Cell.mixes` and `Cell.oracle`.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.simulation.incidents import RolesCalled
from twinmesh.engine.simulation.simulator import Simulation, simulate
from twinmesh.engine.simulation.workload import Workload
from twinmesh.scripts.bench.planner_loads import Load
from twinmesh.scripts.bench.simulation import engine_of

MODELS = {"llama-3.1-8b": 1, "llama-3.1-70b": 4}  # name -> tp
SLOS = {"llama-3.1-8b": SLO(ttft_ms=2000, tpot_ms=30), "llama-3.1-70b": SLO(ttft_ms=4000, tpot_ms=60)}
PERCENTILE = 90.0
LEADS = (0.0, 10.0)  # seconds before a phase, at which an oracle calls for roles
_PARTS = 8  # of the meshes, in which static splits and mixes are counted
_DRAIN = 60.0  # seconds that an oracle's meshes have to take their roles
_WINDOW, _ENOUGH = 10.0, 0.95  # seconds and share, of a recovery

type Figures = dict[str, Any]  # of one run


class Run(NamedTuple):
    """One run to make."""

    name: str
    topology: str
    chunk: int
    roles: str | None = None  # that a pool begins with
    calls: tuple[RolesCalled, ...] = ()
    plans: bool = False


class Cell:
    """One model on so many meshes under one load, at one true speed."""

    def __init__(self, model: str, meshes: int, load: Load, speed: float, args: argparse.Namespace) -> None:
        """Run nothing yet."""
        self.model, self.meshes, self.load, self.speed, self.args = model, meshes, load, speed, args
        self._tp = f"xtp{MODELS[model]}" if MODELS[model] > 1 else ""

    @property
    def name(self) -> str:
        """Name it, for a file of results."""
        return f"{self.model} {self.meshes} meshes {self.load.name} x{self.speed:g}"

    def planner(self) -> Iterator[Run]:
        """Yield the pool that plans its roles; it begins with all meshes doing both."""
        yield self._pool("planner", plans=True)

    def both(self) -> Iterator[Run]:
        """Yield meshes that do both, taking turns and fused, with each chunk size."""
        for mode in ("", "(mode=fused)"):
            for chunk in self.args.chunks:
                name = f"{'fused' if mode else 'both'} {chunk}"
                yield Run(name, f"both{mode}={self.meshes}{self._tp}", chunk)

    def splits(self) -> Iterator[Run]:
        """Yield every static split of up to 8 meshes; of more those by eighths."""
        for prefills in self._eighths():
            decodes = self.meshes - prefills
            text = f"prefill={prefills}{self._tp},decode={decodes}{self._tp}"
            yield Run(f"{prefills}P{decodes}D", text, self.args.chunk)

    def mixes(self) -> Iterator[Run]:
        """Yield roles of a pool of which only a quarter, or a quarter each, has one phase and the rest does both."""
        quarter = self.meshes // 4
        if quarter:
            for prefills, decodes in ((quarter, 0), (0, quarter), (quarter, quarter)):
                roles = _roles(prefills, decodes, self.meshes - prefills - decodes)
                yield self._pool(f"mix {roles}", roles=roles)

    def oracle(self, known: Mapping[str, Figures]) -> Iterator[Run]:
        """Yield pools whose roles are called for by one who knows the load: for each of its phases those under which
        most of the requests that came in it met the SLO, of all splits, all mixes, and all meshes fused; called for 0
        or 10 s before the phase begins. (Roles that stay are runs of their own already.)"""
        texts = [self._best(known, phase) for phase in range(len(self.load.phases))]
        begins = [phase.begin for phase in self.load.phases]
        for lead in LEADS if len(set(texts)) > 1 else ():
            calls = [
                RolesCalled(max(0.0, begin - lead), roles, _DRAIN)
                for begin, roles, before in zip(begins[1:], texts[1:], texts, strict=False)
                if roles != before
            ]
            yield self._pool(f"oracle {lead:g} s ahead", roles=texts[0], calls=tuple(calls))

    def constant(self) -> dict[str, str]:
        """Return the roles of a pool that an oracle chooses from, by the run that shows what they are worth."""
        found = {run.name: run.topology.replace(self._tp, "") for run in self.splits()}
        found |= {run.name: run.roles for run in self.mixes() if run.roles is not None}
        return found | {f"fused {self.args.chunk}": _roles(0, 0, self.meshes)}

    def run(self, run: Run) -> Figures:
        """Simulate, and judge."""
        options: dict[str, Any] = {"prefill_buckets": buckets(run.chunk)}
        slo = SLOS[self.model]
        if run.plans:
            options["slo"] = SLO(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, percentile=PERCENTILE)
        if run.roles is not None:
            options["roles"] = run.roles
        engine = engine_of(run.topology, self.args.device, self.model, **options)
        done = simulate(
            Workload(self.load.name, self.load.requests),
            engine, incidents=run.calls, speed=self.speed, noise=self.args.noise, seed=1,
        )  # fmt: skip
        arrival, met = judged(done, slo)
        phases = [_share(arrival, met, phase.begin, phase.end) for phase in self.load.phases]
        figures: Figures = {"goodput": float(met.sum() / arrival[-1]), "met": float(met.mean()), "phases": phases}
        if self.load.name == "spike":
            figures["recovery"] = recovery(arrival, met, self.load.phases[1].end)
        return figures | ({"flips": len(done.flips)} if done.flips else {})

    def _pool(self, name: str, **more: Any) -> Run:
        return Run(name, f"pool(mode=fused)={self.meshes}{self._tp}", self.args.chunk, **more)

    def _eighths(self) -> list[int]:
        parts = min(self.meshes, _PARTS)
        return [round(part * self.meshes / parts) for part in range(1, parts)]

    def _best(self, known: Mapping[str, Figures], phase: int) -> str:
        constant = self.constant()
        return constant[max(constant, key=lambda name: known[name]["phases"][phase])]


def buckets(chunk: int) -> tuple[int, ...]:
    """Return the sizes of prefill steps whose chunks have at most so many tokens."""
    return (*(size for size in (64, 256, 512) if size < chunk), chunk)


def judged(done: Simulation, slo: SLO) -> tuple[np.ndarray, np.ndarray]:
    """Return when each request came, in order, and whether it met the SLO: [requests] seconds and bool."""
    column = done.records.column
    arrival, first, output = column("arrival"), column("first_token"), column("output_len")
    gaps = (column("last_token") - first) / np.maximum(1, output - 1)
    met = np.ones(len(arrival), bool)
    if slo.ttft_ms is not None:
        met &= 1e3 * (first - arrival) <= slo.ttft_ms
    if slo.tpot_ms is not None:
        met &= 1e3 * gaps <= slo.tpot_ms
    order = np.argsort(arrival, kind="stable")
    return arrival[order], met[order]


def recovery(arrival: np.ndarray, met: np.ndarray, end: float) -> float | None:
    """Return the seconds from `end` until 95 % of those that come in the next 10 s meet the SLO; None: they never
    do."""
    for begin in arrival[arrival >= end]:
        if begin + _WINDOW > arrival[-1]:
            break
        if _share(arrival, met, begin, begin + _WINDOW) >= _ENOUGH:
            return float(begin - end)
    return None


def _share(arrival: np.ndarray, met: np.ndarray, begin: float, end: float) -> float:
    here = (arrival >= begin) & (arrival < end)
    return float(met[here].mean()) if here.any() else 0.0


def _roles(prefills: int, decodes: int, both: int) -> str:
    counts: Sequence[tuple[str, int]] = (("prefill", prefills), ("decode", decodes), ("both", both))
    return ",".join(f"{role}={count}" for role, count in counts if count)
