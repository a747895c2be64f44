"""Which topology to run a model with, for a load and a target: candidates simulated by the objects that serve.

First the memory plan: what does not fit is refused with its arithmetic before anything is simulated. Then the planner's
fluid model ranks what fits (`forecast.py`), and the best `budget` of it are simulated, at least one of each kind
(a planned pool, a static split, both, fused). Then what would have to change is found by trying: fewer devices where
the target is met; more of them, a later target or less load where it is not. The search space is `candidates.py`.
A function of its arguments, as simulations are. No JAX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil

import numpy as np
from msgspec.structs import replace as report_with

from ....models.config import ModelConfig
from ...metrics.load_report import LoadReport
from ...protocol.service import SLO
from ...scheduler.policy import FCFS, Policy
from ...sizing.asked import Asked
from ..assemble import Source, assemble
from ..simulated_report import measured_of
from ..simulator import SimulatedEngine, simulate
from ..workload import Workload, WorkRequest
from .candidates import BUDGET, REQUESTS, Choice, check_devices, choices
from .forecast import demand_of, forecast_splits

_LOADS = (0.9, 0.75, 0.5, 0.25, 0.1)  # parts of the load that are tried
_TRIES = 3  # at a later target, each 5 % later than what was seen
_LATER = 1.05


@dataclass(frozen=True)
class Problem:
    """What a topology is wanted for."""

    model: ModelConfig
    name: str  # of the model, in reports
    source: Source  # of the costs, and of the devices' kind
    devices: int
    workload: Workload
    slo: SLO  # with a percentile
    options: Callable[[Choice, SLO], Asked]  # all else about an engine of this choice
    policy: Policy = FCFS
    budget: int = BUDGET  # simulations in the search itself
    requests: int = REQUESTS  # of the workload, the first so many
    formats: Mapping[str, str] = field(default_factory=dict)  # path -> format, of what the model's files hold quantised

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: no devices, no percentile, or nothing to simulate.
        """
        for name in ("devices", "budget", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not usable: it must be 1 or more.")
        if self.slo.percentile is None:
            raise ValueError("the SLO has no percentile: say of how many requests, as in percentile=99.")


@dataclass(frozen=True)
class Outcome:
    """What became of the load under one choice."""

    choice: Choice
    report: LoadReport
    ttft: float | None  # seconds, at the SLO's percentile
    tpot: float | None

    @property
    def is_met(self) -> bool:
        """Return whether the target is met."""
        return bool(self.report.goodput is not None and self.report.goodput.is_attained)

    @property
    def share(self) -> float:
        """Return the share of requests that met the whole target."""
        return 0.0 if self.report.goodput is None else self.report.goodput.share


@dataclass(frozen=True)
class Change:
    """Something else that was tried, with the choice that it was tried with."""

    what: str  # as in "7 devices instead of 8"
    outcome: Outcome


@dataclass(frozen=True)
class Answer:
    """What was found."""

    problem: Problem
    outcomes: tuple[Outcome, ...]  # of what was simulated, the recommended first
    refused: tuple[tuple[Choice, str], ...]  # what does not fit, and why
    left_out: int  # choices that fit and were predicted to be worse than those simulated
    changes: tuple[Change, ...] = ()  # that would meet the target, or meet it with less

    @property
    def best(self) -> Outcome:
        """Return the recommended one."""
        return self.outcomes[0]


def search(problem: Problem, say: Callable[[str], None] = lambda text: None) -> Answer:
    """Find the topology to recommend; `say` is told what is simulated.

    Raises:
        ValueError: nothing fits into the devices' memory, with the arithmetic; or the workload cannot be served.
    """
    check_devices(problem.devices)
    work = _first(problem)
    fitting, refused = _fitting(problem, choices(problem.model, problem.devices))
    if not fitting:
        raise ValueError(
            f"{problem.name} does not run on {problem.devices} x {problem.source.device}: {refused[-1][1]}"
        )
    chosen = _worth_simulating(problem, work, fitting)
    outcomes = []
    for number, engine in enumerate(chosen, 1):
        say(f"simulating {number} of {len(chosen)}: {engine.choice}")
        outcomes.append(_simulated(problem, work, engine))
    outcomes.sort(key=lambda outcome: _rank(outcome, problem.slo))
    found = Answer(problem, tuple(outcomes), tuple(refused), len(fitting) - len(chosen))
    say("trying what would have to change")
    return replace(found, changes=tuple(_changes(problem, work, found.best)))


@dataclass(frozen=True)
class _Engine:
    """A choice that fits."""

    choice: Choice
    engine: SimulatedEngine


def _first(problem: Problem) -> Workload:
    """Return the part of the workload that is simulated, read once."""
    requests: list[WorkRequest] = list(islice(problem.workload.requests, problem.requests))
    if not requests:
        raise ValueError(f"{problem.workload.name} holds no request: give a load with at least one.")
    return replace(problem.workload, requests=requests)


def _fitting(problem: Problem, wanted: Sequence[Choice]) -> tuple[list[_Engine], list[tuple[Choice, str]]]:
    """Separate choices that fit into memory from those that do not."""
    fitting, refused = list[_Engine](), list[tuple[Choice, str]]()
    for choice in wanted:
        try:
            fitting.append(_engine(problem, choice, problem.slo))
        except ValueError as error:
            refused.append((choice, str(error)))
    return fitting, refused


def _engine(problem: Problem, choice: Choice, slo: SLO) -> _Engine:
    asked = problem.options(choice, slo)
    made = assemble(problem.name, problem.model, asked, problem.source, problem.policy, formats=problem.formats)
    return _Engine(choice, made)


def _worth_simulating(problem: Problem, work: Workload, engines: Sequence[_Engine]) -> list[_Engine]:
    """Choose at most `budget` engines: the best of each kind by prediction, then the best of the others."""
    demand = demand_of(work)
    if demand is None or len(engines) <= problem.budget:
        return list(engines[: problem.budget])
    values = {id(e): forecast_splits(demand, e.engine, problem.slo, [e.choice.split])[0].value for e in engines}
    ranked = sorted(engines, key=lambda e: -values[id(e)])
    kinds = {_kind(engine.choice): engine for engine in reversed(ranked)}
    pools = [engine for engine in ranked if engine.choice.is_planned]  # whose roles move: no split stands for one
    planned = {engine.choice.tp: engine for engine in reversed(pools)}.values()
    first = list(dict.fromkeys([id(e) for e in (*planned, *kinds.values(), *ranked)]))[: problem.budget]
    return [engine for engine in engines if id(engine) in first]


def _kind(choice: Choice) -> str:
    return choice.topology.partition("=")[0]


def _simulated(problem: Problem, work: Workload, engine: _Engine) -> Outcome:
    ran = simulate(work, engine.engine)
    report = measured_of(ran, engine.engine, problem.source, workload=work.name, model=problem.name).report
    run = report_with(report.run, topology=str(engine.choice), gpus=problem.devices)  # with its chunks; idle ones cost
    report = report_with(report, run=run)
    slo = engine.engine.config.slo
    assert slo is not None
    assert slo.percentile is not None
    first, last, arrival, tokens = (
        np.asarray(ran.records.column(name), float) for name in ("first_token", "last_token", "arrival", "output_len")
    )
    tpot = (last - first)[tokens > 1] / (tokens[tokens > 1] - 1)
    return Outcome(engine.choice, report, _at(first - arrival, slo.percentile), _at(tpot, slo.percentile))


def _at(values: np.ndarray, percentile: float) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percentile)) if len(known) else None


def _rank(outcome: Outcome, slo: SLO) -> tuple[bool, float, float]:
    """Order outcomes: those that meet the target, by the share of requests that do, by how far from it they are."""
    limits = (outcome.ttft, slo.ttft_ms), (outcome.tpot, slo.tpot_ms)
    distance = max(1000 * (seen or 0.0) / limit for seen, limit in limits if limit is not None)
    return not outcome.is_met, -round(outcome.share, 3), distance


# ---- what would have to change


def _changes(problem: Problem, work: Workload, best: Outcome) -> Iterator[Change]:
    used = problem.devices - best.choice.idle
    if best.is_met:
        fewer = [count for count in (used, used - best.choice.tp, used // 2, used // 4) if count < problem.devices]
        yield from _with_other_devices(problem, work, best, fewer)
        return
    more = [used + step * best.choice.tp for step in (1, 2, 4) if step * best.choice.tp <= problem.devices]
    yield from islice(_with_other_devices(problem, work, best, more), 1)
    yield from _with_later_target(problem, work, best)
    yield from _with_less_load(problem, work, best)


def _with_other_devices(problem: Problem, work: Workload, best: Outcome, counts: Sequence[int]) -> Iterator[Change]:
    """Yield what meets the target on other numbers of devices: a choice like the best one, or all meshes doing both."""
    for devices in dict.fromkeys(count for count in counts if count > 0):
        other = replace(problem, devices=devices)
        alike = [c for c in choices(problem.model, devices) if c.tp == best.choice.tp]
        wanted = [
            c for c in alike if _kind(c) == "pool" or (c.chunk == best.choice.chunk and _kind(c) == _kind(best.choice))
        ]
        fitting, _ = _fitting(other, [c for c in wanted if c.is_planned or c.split.both] or alike[:1])
        outcomes = [_simulated(other, work, engine) for engine in fitting[:2]]
        met = [outcome for outcome in outcomes if outcome.is_met]
        if met:
            number = f"{devices} device{'s' if devices > 1 else ''} instead of {problem.devices}"
            yield Change(number, min(met, key=lambda o: _rank(o, other.slo)))


def _with_later_target(problem: Problem, work: Workload, best: Outcome) -> Iterator[Change]:
    """Yield the nearest target that the best choice meets, if it is less than ten times as late."""
    slo, factor = problem.slo, 1.0
    for _ in range(_TRIES):
        later = SLO(
            ttft_ms=_later(slo.ttft_ms, best.ttft, factor),
            tpot_ms=_later(slo.tpot_ms, best.tpot, factor),
            percentile=slo.percentile,
        )
        outcome = _simulated(problem, work, _engine(problem, best.choice, later))
        if outcome.is_met:
            times = [
                f"{name} {new:g} ms instead of {old:g}"
                for name, old, new in (("TTFT", slo.ttft_ms, later.ttft_ms), ("TPOT", slo.tpot_ms, later.tpot_ms))
                if old is not None and new is not None and new != old
            ]
            yield Change(" and ".join(times), outcome)
            return
        factor *= _LATER


def _later(limit: float | None, seen: float | None, factor: float) -> float | None:
    """Return a time in milliseconds that covers what was seen, in two digits, and is no earlier than the limit."""
    if limit is None or seen is None:
        return limit
    wanted = 1000 * seen * factor
    if wanted <= limit:
        return limit
    unit = 10 ** (len(str(int(wanted))) - 2)
    return float(ceil(wanted / unit) * unit) if unit >= 1 else ceil(wanted * 10) / 10


def _with_less_load(problem: Problem, work: Workload, best: Outcome) -> Iterator[Change]:
    """Yield the largest part of the load at which the best choice meets the target."""
    engine = _engine(problem, best.choice, problem.slo)
    for load in _LOADS:
        slower = [r if r.at is None else replace(r, at=r.at / load) for r in work.requests]
        outcome = _simulated(problem, replace(work, requests=slower), engine)
        if outcome.is_met:
            yield Change(f"{load:.0%} of the load", outcome)
            return
