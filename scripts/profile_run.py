"""Runs the loads of a profile on an engine and turns what was seen into costs and their errors."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.host.progress import Progress
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.costs.fit import fit_costs, fit_host, predicted, spread
from twinmesh.engine.simulation.costs.measured import (
    Entered,
    HostWork,
    Kind,
    MeasuredStep,
    MeasuredTransfer,
    without_cold,
)
from twinmesh.engine.simulation.costs.overlaps import measured_steps
from twinmesh.engine.simulation.costs.profile import Errors
from twinmesh.engine.simulation.costs.step_watch import StepWatch
from twinmesh.scripts.profile_loads import Grid, Load, Place, Served, Serving

if TYPE_CHECKING:
    from twinmesh.engine.api.llm import LLM
    from twinmesh.engine.api.outputs import TextDelta
    from twinmesh.engine.api.streams import RequestStream

ROUNDS = 4  # of all loads: what drifts on a machine meanwhile, such as its clock, is in all of them alike
_LEAST_ID = 3  # of made-up tokens: those before are special in most vocabularies


class Seen(NamedTuple):
    """What an engine did under one load."""

    load: Load | Serving
    steps: list[MeasuredStep]
    transfers: list[MeasuredTransfer]
    entered: list[Entered]
    host: HostWork
    lags: list[float]  # from the ends of steps until their tokens were taken in


class Point(NamedTuple):
    """Steps that are alike, measured and predicted, in seconds on average."""

    load: Load | Serving
    kind: Kind
    bucket: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Return the error as a share of what was measured."""
        return self.predicted / self.measured - 1.0

    def __str__(self) -> str:
        """Say what it is of."""
        load, lengths = self.load, sorted(set(self.load.prompts))
        of = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return (
            f"{self.kind} {self.bucket}, {load.name} ({len(load.prompts)} of {of} tokens): "
            f"{1e3 * self.measured:.2f} ms measured, {1e3 * self.predicted:.2f} predicted"
        )


def run_loads(llm: "LLM", rounds: int, *, is_quick: bool, progress: bool) -> list[Seen]:
    """Run every load, or a few of each kind if `is_quick`, on an engine that routes as `OnMesh` does, in so many
    rounds; return what was seen, cold runs left out."""
    config, pools = llm.engine.config, llm.engine.core.inspect(lambda scheduler, _: scheduler.pools)
    room = min(min(pool.pages) for pool in pools) * config.page_size
    loads = list(Grid(config, room, is_quick=is_quick).loads()) * rounds
    watch = StepWatch(config, pools, llm.engine.core.clock)
    runner, found = _Runner(llm, watch), []
    with (
        llm.engine.core.observe(watch),
        Progress("profiling", len(loads), "loads", shown=progress) as line,
    ):
        for load in loads:
            found.append(runner.run(load))
            line.advance(1, load.name)
    warm = {id(step) for step in without_cold(step for seen in found for step in seen.steps)}
    return [seen._replace(steps=[step for step in seen.steps if id(step) in warm]) for seen in found]


def fitted(seen: Sequence[Seen]) -> CostModel:
    """Fit costs to what was seen under the loads that are for it."""
    own = [one for one in seen if one.load.is_fitted]
    return fit_costs(
        [step for one in own for step in one.steps],
        [transfer for one in own for transfer in one.transfers],
        fit_host(
            [entered for one in own for entered in one.entered],
            [one.host for one in own],
            [lag for one in own for lag in one.lags],
        ),
    )


def spread_of(seen: Sequence[Seen], costs: CostModel) -> float:
    """Return how far steps spread around the costs: the standard deviation of the logarithm of their times."""
    return spread(costs, [step for one in seen for step in one.steps if one.load.is_fitted])


def held_out(seen: Sequence[Seen], costs: CostModel) -> list[Point]:
    """Hold costs against the loads that they were not fitted to; steps of one load that hold as much are one point."""
    groups: dict[tuple[object, ...], list[tuple[Load | Serving, MeasuredStep]]] = defaultdict(list)
    for one in seen:
        if not one.load.is_fitted:
            for step in one.steps:
                groups[one.load, step.kind, step.bucket, step.chunks, step.pairs, step.rows].append((one.load, step))
    return [_point(group, costs) for group in groups.values()]


def errors_of(points: Sequence[Point]) -> list[Errors]:
    """Sum up the errors of each kind of step."""
    kinds = dict.fromkeys(point.kind for point in points)
    found = {kind: [abs(point.error) for point in points if point.kind == kind] for kind in kinds}
    return [Errors(kind, len(errors), sum(errors) / len(errors), max(errors)) for kind, errors in found.items()]


def _point(group: Sequence[tuple[Load | Serving, MeasuredStep]], costs: CostModel) -> Point:
    load, step = group[0]
    steps = [step for _, step in group]
    measured = sum(step.seconds for step in steps) / len(steps)
    return Point(load, step.kind, step.bucket, measured, sum(predicted(costs, step) for step in steps) / len(steps))


class _Runner:
    """Runs loads one after the other."""

    def __init__(self, llm: "LLM", watch: StepWatch) -> None:
        self._llm, self._watch = llm, watch
        self._random, self._drawing = np.random.default_rng(0), Lock()
        self._behind: list[Iterator[TextDelta]] = []  # of what runs beside the load

    def run(self, load: Load | Serving) -> Seen:
        """Run a load to its end; return what was seen meanwhile."""
        watch, before = self._watch, self._host()
        ran, transfers = len(watch.ran), len(watch.transfers)
        entered, lags = len(watch.entered), len(watch.lags)
        if isinstance(load, Serving):
            with ThreadPoolExecutor(load.concurrency) as callers:
                list(callers.map(self._serve, load.requests))
        else:
            self._run_at_once(load)
        self._wait_until_idle()
        steps, after = measured_steps(watch.ran[ran:]), self._host()
        rows = sum(step.chunks + step.rows for step in steps)
        host = HostWork(after[0] - before[0], after[1] - before[1], rows, len(watch.entered) - entered)
        return Seen(load, steps, watch.transfers[transfers:], watch.entered[entered:], host, watch.lags[lags:])

    def _serve(self, request: Served) -> None:
        self._stream(request.prompt, request.tokens, request.place).result()

    def _run_at_once(self, load: Load) -> None:
        self._behind.clear()
        with ExitStack() as behind:
            if load.behind is not None:
                self._start_behind(load.behind, behind)
            streams = self._start(load, behind)
            for stream in streams:
                stream.result()

    def _start_behind(self, load: Load, stack: ExitStack) -> None:
        """Start what runs beside a load; where it decodes, wait until all of it does."""
        streams = self._start(load, stack)
        if load.tokens > 1:
            for stream in streams:
                self._behind.append(iter(stream))  # dropping an iterator would end its request
                next(self._behind[-1])

    def _start(self, load: Load, stack: ExitStack) -> "list[RequestStream]":
        streams = []
        for length in load.prompts:
            streams.append(self._stream(length, load.tokens, load.place))
            stack.callback(streams[-1].close)
        return streams

    def _stream(self, length: int, tokens: int, place: Place) -> "RequestStream":
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        with self._drawing:
            ids = self._random.integers(_LEAST_ID, self._llm.engine.tokenizer.vocab_size, length).tolist()
        return self._llm.stream(ids, params, priority=place.priority)

    def _wait_until_idle(self) -> None:
        while self._llm.engine.core.inspect(_is_busy):
            time.sleep(0.001)

    def _host(self) -> tuple[float, int]:
        metrics = self._llm.metrics()
        return metrics.host_seconds, metrics.steps


def _is_busy(scheduler: Scheduler, executor: object) -> bool:
    """Return whether requests run, or steps of some that were aborted."""
    return bool(scheduler.requests) or any(mesh.in_flight for mesh in scheduler.meshes)
