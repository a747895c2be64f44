"""Runs a workload through the objects that serve, in virtual time: core loop, scheduler, router, admission, planner.

Only what takes time is simulated: devices, links, the host and the callers. A run is a function of workload, engine,
seed, noise, speed and incidents: the same bits every time. Nothing here decides anything; the decision log that it
writes replays as one of a real engine does.

The dispatching thread is one server: it takes in all messages that are there, lets the loop dispatch, which takes as
long as the steps cost it, and then looks again. Devices and callers go on meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from ..config import EngineConfig, PoolSize
from ..core.changes import NewRoles
from ..core.inspection import Observer
from ..core.loop import Loop, Message
from ..core.role_changes import RoleChanges
from ..core.run_watch import RunWatch
from ..core.stamper import Stamper
from ..core.submission import Submission
from ..core.waiting_room import RoomKeeper, WaitingRoom
from ..metrics.gaps import Gaps
from ..metrics.load_report import Flip
from ..metrics.metrics import Metrics
from ..metrics.request_records import RequestRecord, RequestRecords
from ..metrics.series import Series
from ..protocol.actions import Action
from ..protocol.events import AbortRequested, MeshJoined, Tick
from ..protocol.service import is_positive
from ..roles import read_goal
from ..scheduler.cost_model import CostModel
from ..scheduler.decision_log import DecisionLog, RecordingScheduler
from ..scheduler.policy import FCFS, Policy
from ..scheduler.scheduler import Scheduler
from .arrivals import Arrivals
from .folding import Folding
from .garbage import seldom_collected
from .incidents import Aborted, Incident, MeshFails, MeshGone, MeshStarts, RolesCalled
from .simulated_request import SimulatedRequest
from .virtual_executor import VirtualExecutor
from .virtual_meshes import TrueTimes
from .virtual_time import VirtualTime
from .workload import Workload

_MOST_TICKS = 100_000  # in a row, of which none changes anything: requests wait for what never comes


@dataclass(frozen=True)
class SimulatedEngine:
    """An engine that exists in numbers alone."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]  # of each mesh
    costs: CostModel | tuple[CostModel, ...]  # of every mesh, or of each
    policy: Policy = FCFS

    def __post_init__(self) -> None:
        """Check the numbers of pools and costs.

        Raises:
            ValueError: not one for each mesh.
        """
        meshes = len(self.config.topology.meshes)
        if len(self.pools) != meshes or len(self.costs_of_meshes) != meshes:
            raise ValueError(
                f"the topology has {meshes} meshes, with {len(self.pools)} pools and {len(self.costs_of_meshes)} cost "
                "models: give one for each."
            )

    @property
    def costs_of_meshes(self) -> tuple[CostModel, ...]:
        """Return the costs of each mesh."""
        costs = self.costs
        return costs if isinstance(costs, tuple) else (costs,) * len(self.config.topology.meshes)


@dataclass(frozen=True)
class Simulation:
    """What became of a run."""

    records: RequestRecords  # in the order in which requests ended; empty where they went elsewhere
    seconds: float  # virtual ones, from the start to the last thing that happened
    busy: tuple[float, ...]  # seconds that each mesh has computed
    roles: tuple[tuple[float, tuple[str, ...]], ...]  # of all meshes, from when on
    flips: tuple[Flip, ...]  # their changes, by the time since the start
    metrics: Metrics  # as the engine's own
    events: int  # messages that the engine took in
    decisions: int  # actions that the scheduler gave out
    folds: int  # times that decode steps of a mesh were taken in many at once
    folded_steps: int  # and how many these were; `metrics.steps` counts them too
    series: Series | None  # samples of the engine's state, by the time since the start; None: none were asked for
    displaced: int = 0  # requests that had their place on a mesh when it was gone (`MeshGone`)


def simulate(
    workload: Workload,
    engine: SimulatedEngine,
    *,
    seed: int = 0,
    log: DecisionLog | None = None,
    incidents: Sequence[Incident] = (),
    noise: float = 0.0,
    speed: float = 1.0,
    each: Callable[[RequestRecord], None] | None = None,
    gaps: Gaps | None = None,
    folded: bool = True,
    samples: bool = False,
    stop_after: float = inf,
) -> Simulation:
    """Run a workload to its end.

    Args:
        workload: the requests; each ends after exactly its `output_len` tokens.
        engine: what serves them.
        seed: of the noise; without noise it changes nothing.
        log: takes the scheduler's events and decisions, and stamps; the caller closes it.
        incidents: what else happens.
        noise: standard deviation of the logarithm of each step's true time, of which nobody knows; the mean stays.
        speed: true step times are so many times those that the costs say.
        each: takes the records one by one, instead of `Simulation.records`.
        gaps: counts the gaps between the tokens of requests that end.
        folded: whether decode steps may be taken in many at once (`folding.py`), which changes nothing but the time
            that it takes.
        samples: whether to take samples of the engine's state (`Simulation.series`).
        stop_after: seconds from the start; nobody comes at that time or later.

    Raises:
        ValueError: a workload that cannot be served, or numbers that cannot be.
    """
    if not is_positive(speed) or not 0 <= noise < 1:
        raise ValueError(f"speed={speed!r}, noise={noise!r}: speed must be above 0, and noise at least 0 and below 1.")
    run = _Run(workload, engine, TrueTimes(noise, speed, seed), log, incidents, each, gaps, folded, samples, stop_after)
    with seldom_collected():
        return run.run()


class _Run(Observer):
    """One run."""

    def __init__(
        self,
        workload: Workload,
        engine: SimulatedEngine,
        true: TrueTimes,
        log: DecisionLog | None,
        incidents: Sequence[Incident],
        each: Callable[[RequestRecord], None] | None,
        gaps: Gaps | None,
        folded: bool,
        samples: bool,
        stop_after: float,
    ) -> None:
        config, pools, costs = engine.config, engine.pools, engine.costs_of_meshes
        self._time, self._inbox = VirtualTime(), list[Message]()
        self._scheduler = (
            Scheduler(config, pools, engine.policy)
            if log is None
            else RecordingScheduler(config, pools, log, engine.policy)
        )
        self._executor = VirtualExecutor(config, pools, costs, self._time, self._inbox.append, true)
        self._loop = Loop(self._scheduler, self._executor, self._time, SimulatedRequest)
        self._loop.observers.add(self)
        self._folding = Folding(self._loop, self._scheduler, self._executor, self._time) if folded else None
        if log is not None:
            self._loop.observers.add(Stamper(log, self._scheduler, self._time))
        room = WaitingRoom(config.max_waiting, config.max_waiting_tokens, self._time)
        if room.is_bounded:
            self._loop.observers.add(RoomKeeper(room, self._scheduler))
        self._records = RequestRecords()
        self._events = self._decisions = 0
        self._displaced = set[int]()
        self._changes, self._watch = RoleChanges(self._scheduler, 0.0), None
        if samples:
            meshes = self._executor.meshes
            self._watch = RunWatch(self._scheduler, self._time, lambda: meshes.busy)
            self._loop.observers.add(self._watch)
        for incident in sorted(incidents, key=lambda incident: incident.at):
            self._plan(incident)
        self._arrivals = Arrivals(
            workload,
            config,
            costs[0].host,
            self._time,
            room,
            self._submit,
            each or self._records.append,
            gaps,
            stop_after,
        )

    def run(self) -> Simulation:
        """Take turns until everything has ended."""
        ticks = 0
        while self._arrivals.left:
            if not self._inbox:
                ticks = ticks + 1 if self._wait() else 0
                if ticks > _MOST_TICKS:
                    raise RuntimeError(f"{self._arrivals.left} requests wait, and nothing goes on any more")
            if self._inbox:
                self._turn()
        self._time.advance(self._time.now)
        return self._result()

    def decided(self, scheduler: Scheduler, actions: Sequence[Action]) -> None:
        """Count what the scheduler gives out, and see new roles."""
        self._decisions += len(actions)
        self._changes.look(scheduler, self._time.now)

    def _wait(self) -> bool:
        """Go on until there is a message; return whether it is only that time has passed."""
        due = self._loop.next_due()  # which nothing but messages changes
        while not self._inbox and self._arrivals.left:
            planned = self._time.next()
            if due is not None and (planned is None or due < planned):
                self._time.advance(due)
                self._inbox.append(Tick(self._time.now))
                return True
            if planned is None:
                raise RuntimeError(f"{self._arrivals.left} requests wait, and nothing is under way")
            self._time.advance(planned)
        return False

    def _turn(self) -> None:
        """Take in what is there, and let the loop dispatch; what happens meanwhile comes in with the next turn."""
        messages, loop = self._inbox.copy(), self._loop
        self._inbox.clear()
        folding = self._folding
        if folding is not None:
            folding.before(messages)
        for message in messages:
            loop.take(message)
        self._events += len(messages)
        loop.dispatch()
        while folding is not None and folding.after():
            loop.dispatch()
        self._time.advance(self._time.now)

    def _submit(self, submission: Submission) -> None:
        self._inbox.append((submission,))

    def _result(self) -> Simulation:
        log, unfinished = self._loop.requests.figures(self._time.now)
        host = self._executor.host
        host.steps = self._loop.host.steps
        return Simulation(
            self._records,
            self._time.now,
            tuple(self._executor.meshes.busy),
            tuple(self._changes.roles),
            tuple(self._changes.flips),
            log.metrics(
                unfinished,
                0,
                self._scheduler.counters,
                self._executor.traffic,
                host,
                roles=self._scheduler.roles(),
                plan=self._scheduler.plan,
            ),
            self._events,
            self._decisions,
            self._folding.folds if self._folding is not None else 0,
            self._folding.steps if self._folding is not None else 0,
            None if self._watch is None else self._watch.series(),
            len(self._displaced),
        )

    # ---- incidents

    def _plan(self, incident: Incident) -> None:
        """Plan something that happens besides requests.

        Raises:
            ValueError: there is no such mesh, or these roles cannot be called for.
        """
        meshes = len(self._scheduler.meshes)
        if isinstance(incident, MeshFails | MeshGone | MeshStarts) and not 0 <= incident.mesh < meshes:
            raise ValueError(f"{incident} is of no mesh that there is: they are 0 to {meshes - 1}.")
        match incident:
            case MeshFails():
                self._time.at(incident.at, self._fail, incident)
            case MeshGone(at=at, mesh=mesh, down=down, silent=silent):
                if silent:
                    self._time.at(at, self._silence, incident)
                self._time.at(at + silent, self._lose, mesh)
                self._time.at(at + down, self._join, mesh)
            case MeshStarts(at=at, mesh=mesh):
                self._executor.meshes.pause(mesh, at)
            case RolesCalled(at=at, roles=roles, drain_timeout=seconds):
                goal = read_goal(roles, self._scheduler.config.topology)
                self._time.at(at, self._inbox.append, NewRoles(goal, at + seconds))
            case Aborted(at=at, number=number):
                self._time.at(at, self._inbox.append, AbortRequested(at, number))

    def _fail(self, incident: MeshFails) -> None:
        if self._folding is not None:
            self._folding.end_all()
        self._executor.meshes.pause(incident.mesh, incident.at + incident.down)
        self._executor.fail(incident.mesh, "the mesh has failed.")

    def _silence(self, incident: MeshGone) -> None:
        if self._folding is not None:
            self._folding.end_all()
        self._executor.silence(incident.mesh, incident.at + incident.silent)

    def _lose(self, mesh: int) -> None:
        if self._folding is not None:
            self._folding.end_all()
        self._displaced.update(request.id for request in self._scheduler.meshes[mesh].placed)
        self._executor.lose(mesh)

    def _join(self, mesh: int) -> None:
        if self._folding is not None:
            self._folding.end_all()
        self._inbox.append(MeshJoined(self._time.now, mesh))
