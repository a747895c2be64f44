"""The real engine's side of `belief.py`: an engine in a process of its own, its profile, and loads that run on it.

Requests are submitted at their times whatever happens (open loop), by one thread that sleeps in between; prompts are
random token ids, so that nothing is found in a cache, and every answer has the length that was asked for. Observers
see what the engine does meanwhile, so that times can be told apart as the simulation does.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.metrics.request_records import RequestRecord, divide_ttft
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.cost_model import CostModel
from twinmesh.engine.simulation.costs.overlaps import Ran
from twinmesh.engine.simulation.costs.profile import Errors
from twinmesh.engine.simulation.costs.step_watch import StepWatch
from twinmesh.engine.simulation.workload import Workload

if TYPE_CHECKING:
    from twinmesh import LLM
    from twinmesh.scripts.profile_run import Seen

PROFILE = "profile"  # asks for a measurement
_LEAST_ID = 3  # of made-up tokens: those before are special in most vocabularies


class Served(NamedTuple):
    """An engine that runs, and what a step costs it."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]
    costs: CostModel
    spread: float  # of step times around them
    errors: list[Errors]  # of the costs, for points held out of their fit


class Load(NamedTuple):
    """A load to be run."""

    workload: Workload
    calls: tuple[tuple[float, str], ...]  # for roles, each at its time


class Outcome(NamedTuple):
    """What a run gave."""

    records: list[RequestRecord]
    steps: list[Ran]
    late: float  # seconds by which the latest request was submitted after its time


def serve(connection: Connection, model: str, options: dict[str, Any], is_quick: bool) -> None:
    """Run engines in this process until the other end of the connection says None.

    For each `PROFILE` it measures every load of a profile once more, on an engine that does nothing else, and sends a
    `Served` of all that was measured so; for each `Load` that it gets it sends the `Outcome`.
    """
    from twinmesh import LLM
    from twinmesh.scripts.profile_loads import OnMesh
    from twinmesh.scripts.profile_run import run_loads

    with LLM(model, policy=OnMesh(), **options) as profiled, LLM(model, **options) as llm:
        core, config = llm.engine.core, llm.config
        pools = tuple(core.inspect(lambda scheduler, _: scheduler.pools))
        steps, requests, seen = StepWatch(config, pools, core.clock), RequestWatch(core.clock), list["Seen"]()
        with core.observe(steps), core.observe(requests):
            while (asked := connection.recv()) is not None:
                if asked == PROFILE:
                    seen += run_loads(profiled, 1, is_quick=is_quick, progress=False)
                    connection.send(_served(config, pools, seen))
                    continue
                steps.ran.clear()
                requests.clear()
                records, late = run(llm, requests, asked)
                connection.send(Outcome(records, list(steps.ran), late))


def _served(config: EngineConfig, pools: tuple[PoolSize, ...], seen: "Sequence[Seen]") -> Served:
    from twinmesh.scripts.profile_run import errors_of, fitted, held_out, spread_of

    costs = fitted(seen)
    return Served(config, pools, costs, spread_of(seen, costs), errors_of(held_out(seen, costs)))


class RequestWatch(Observer):
    """When requests were taken in; on the dispatching thread, so it does little."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing; `clock` is the engine's."""
        self._clock = clock
        self._accepted: list[float] = []  # when each request was taken in, in the order of their arrival

    def clear(self) -> None:
        """Forget what was; call it while nothing runs."""
        self._accepted.clear()

    def received(self, message: object) -> None:
        """See submissions, and when."""
        if isinstance(message, tuple):
            now = self._clock()
            self._accepted += [now for submission in message if isinstance(submission, Submission)]

    def record(self, number: int, line: Timeline, prompt_len: int, cached: int) -> RequestRecord:
        """Make the record of the request that came as number `number`, divided as a simulation's are."""
        parts = divide_ttft(line.arrival, self._accepted[number], line.prefill_start, line.first_token)
        return RequestRecord(
            number, line.arrival, prompt_len, len(line.tokens), cached, line.first_token, line.tokens[-1], line.finish,
            queue=parts.queue, prefill=parts.prefill, handoff=line.handoff or 0.0, host=parts.host,
        )  # fmt: skip


def run(llm: "LLM", watch: RequestWatch, load: Load) -> tuple[list[RequestRecord], float]:
    """Run a load to its end; return what became of its requests, and by how many seconds the latest came too late."""
    from twinmesh import SamplingParams

    random = np.random.default_rng(time.time_ns())
    works = list(load.workload.requests)
    vocabulary = llm.engine.tokenizer.vocab_size
    prompts = [random.integers(_LEAST_ID, vocabulary, work.prompt_len).tolist() for work in works]
    params = [
        SamplingParams(temperature=0, max_tokens=work.output_len, ignore_eos=True, detokenize=False) for work in works
    ]
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
        records.append(watch.record(number, result.timeline, work.prompt_len, result.num_cached_tokens or 0))
    return records, late


def _call(llm: "LLM", at: float, roles: str) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
    llm.set_roles(roles)


def _raise_if_failed(calls: Sequence[Future[None]]) -> None:
    for call in calls:
        call.result()
