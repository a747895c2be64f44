"""The real engine's side of `belief.py`: an engine in a process of its own, its profile, and loads that run on it.

Requests are submitted at their times whatever happens (open loop), by one thread that sleeps in between; prompts are
random token ids, so that nothing is found in a cache, and every answer has the length that was asked for. `StepWatch`
sees what the engine does meanwhile, so that times can be told apart as the simulation does.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.metrics.request_records import RequestRecord
from twinmesh.engine.protocol.actions import Action, Chunk, Decode, Fused, Prefill
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.workload import Workload

if TYPE_CHECKING:
    from twinmesh import LLM

type Step = Prefill | Decode | Fused


class Served(NamedTuple):
    """An engine that runs, and what a step costs it."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]
    costs: CostModel
    errors: Any  # of the costs, for points held out of their fit


class Ran(NamedTuple):
    """A step of a run."""

    step: Step
    begun: float  # dispatched, or the end of the step before it on its mesh
    ended: float  # its result was there


class Load(NamedTuple):
    """A load to be run."""

    workload: Workload
    calls: tuple[tuple[float, str], ...]  # for roles, each at its time


class Outcome(NamedTuple):
    """What a run gave."""

    records: list[RequestRecord]
    steps: list[Ran]
    late: float  # seconds by which the latest request was submitted after its time


def serve(connection: Connection, model: str, options: dict[str, Any], profile: Any) -> None:
    """Run an engine in this process until the other end of the connection closes.

    First sends what `profile(llm)` gives, a `Served`; then the `Outcome` of each `Load` that it gets.
    """
    from twinmesh import LLM

    watch = StepWatch()
    with LLM(model, **options) as llm:
        connection.send(profile(llm))
        with llm.engine.core.observe(watch):
            while (load := connection.recv()) is not None:
                connection.send(run(llm, watch, load))


class StepWatch(Observer):
    """What the engine does in a run; on the dispatching thread, so it does as little as it can."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.clear()

    def clear(self) -> None:
        """Forget what was; call it while nothing runs."""
        self.ran: list[Ran] = []
        self.ids: list[int] = []  # of requests, in the order in which they were taken in
        self.accepted: dict[int, float] = {}  # request -> when it was taken in
        self.read: dict[int, float] = {}  # request -> seconds from its first token's result to its reading
        self._steps: dict[tuple[int, int], tuple[float, Step]] = {}
        self._free: dict[int, float] = {}

    def received(self, message: object) -> None:
        """See submissions and results, and when."""
        now = time.monotonic()
        if isinstance(message, StepResult):
            found = self._steps.pop((message.mesh, message.step), None)
            if found is not None:
                begun = max(found[0], self._free.get(message.mesh, 0.0))
                self.ran.append(Ran(found[1], begun, message.t))
            self._free[message.mesh] = message.t
            for row in message.rows:
                if isinstance(row, Chunk) and row.is_last:
                    self.read.setdefault(row.request_id, now - message.t)
        elif isinstance(message, tuple):
            for submission in message:
                if isinstance(submission, Submission):
                    self.ids.append(submission.facts.id)
                    self.accepted[submission.facts.id] = now

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """See what is dispatched now."""
        now = time.monotonic()
        for action in actions:
            if isinstance(action, Prefill | Decode | Fused):
                self._steps[action.mesh, action.step] = now, action

    def record(self, number: int, line: Timeline, prompt_len: int, cached: int) -> RequestRecord:
        """Make the record of the request that came in as number `number`, divided as a simulation's are."""
        id_ = self.ids[number]
        first, start = line.first_token, line.prefill_start
        assert first is not None
        assert start is not None
        before = self.accepted[id_] - line.arrival
        queue = max(0.0, start - self.accepted[id_])
        host = min(first - line.arrival - queue, before + self.read.get(id_, 0.0))
        return RequestRecord(
            number, line.arrival, prompt_len, len(line.tokens), cached, first, line.tokens[-1], line.finish,
            queue=queue, prefill=first - line.arrival - queue - host, handoff=line.handoff or 0.0, host=host,
        )  # fmt: skip


def run(llm: "LLM", watch: StepWatch, load: Load) -> Outcome:
    """Run a load to its end."""
    from twinmesh import SamplingParams

    random = np.random.default_rng(time.time_ns())
    works = list(load.workload.requests)
    prompts = [random.integers(100, 20_000, work.prompt_len).tolist() for work in works]
    params = [
        SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True, detokenize=False) for work in works
    ]
    watch.clear()
    streams, late = [], 0.0
    with ThreadPoolExecutor(1) as caller:
        begin = time.monotonic() + 0.1
        calls = [caller.submit(_call, llm, begin + at, roles) for at, roles in load.calls]
        for work, prompt, asked in zip(works, prompts, params, strict=True):
            due = begin + work.time
            time.sleep(max(0.0, due - time.monotonic()))
            late = max(late, time.monotonic() - due)
            streams.append(llm.stream(prompt, asked))
        results = [stream.result() for stream in streams]
        _raise_if_failed(calls)
    records = []
    for number, (work, result) in enumerate(zip(works, results, strict=True)):
        assert result.timeline is not None
        records.append(watch.record(number, result.timeline, work.prompt_len, result.num_cached_tokens or 0))
    return Outcome(records, watch.ran, late)


def _call(llm: "LLM", at: float, roles: str) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
    llm.set_roles(roles)


def _raise_if_failed(calls: Sequence[Future[None]]) -> None:
    for call in calls:
        call.result()
