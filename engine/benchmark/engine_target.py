"""A real engine as a target: the driver, what is watched meanwhile, and the report. The engine stays the caller's."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

from msgspec.structs import replace

from ..api.base import BaseLLM
from ..api.client import EngineClient
from ..core.busy_time import BusyTime
from ..core.run_watch import RunWatch
from ..metrics.distribution import Distribution
from ..metrics.load_report import LoadReport, MeshUse, Power, Run
from ..metrics.metrics import Metrics
from ..metrics.report_file import Measured
from ..roles import as_text
from ..sharding.mesh import find_devices
from ..simulation.costs.devices import peaks_of
from ..startup.decision_file import name_of
from .driver import Driven, drive
from .power import Meter
from .target import Load


class EngineTarget:
    """An engine that runs in this process."""

    def __init__(
        self,
        llm: BaseLLM,
        model: str | Path,
        *,
        policy: str = "fcfs",
        dollars_per_gpu_hour: float | None = None,
        meter: Meter | None = None,
    ) -> None:
        """Drive an engine.

        Args:
            llm: the engine; nothing else is to use it while a load runs.
            model: its name, for the report.
            policy: likewise.
            dollars_per_gpu_hour: what an hour of a GPU costs; None: what is published of the device.
            meter: measures what the GPUs draw; None: nobody does.
        """
        self._llm, self._meter = llm, meter
        self._drives = itertools.count()  # prompts of one load are none of another's: the prefix cache stays
        self._client = EngineClient(llm.engine, seed=0)
        self._facts = self._run_of(name_of(model), policy)
        peaks = peaks_of(self._facts.device)
        published = None if peaks is None else peaks.dollars
        self._dollars = published if dollars_per_gpu_hour is None else dollars_per_gpu_hour

    @property
    def longest(self) -> int:
        """Return the most tokens that prompt and answer may have together."""
        return self._llm.config.max_model_len

    def run(self, load: Load) -> Measured:
        """Run a load, as `Target.run`."""
        if load.warmup is not None:
            drive(self._client, Load(load.warmup), {}, seed=self._next_seed())
        with self.watched() as watch:
            driven = drive(self._client, load, watch.accepted, seed=self._next_seed())
        return watch.measured(load.workload.name, driven)

    @contextmanager
    def watched(self) -> Iterator["Watch"]:
        """Watch the engine while somebody else drives it, who has the report from what this gives, afterwards."""
        core = self._llm.engine.core
        busy = BusyTime(len(self._llm.config.topology.meshes), core.clock)
        run: RunWatch = core.inspect(lambda scheduler, _: RunWatch(scheduler, core.clock, lambda: busy.seconds))
        watch = Watch(self._llm, self._facts, self._dollars, run)
        with core.observe(busy), core.observe(run):
            started = None if self._meter is None else self._meter.start()
            yield watch
            watch.power = None if self._meter is None or started is None else self._meter.stop(started)

    def _next_seed(self) -> tuple[int, ...]:
        return (next(self._drives),)

    def _run_of(self, model: str, policy: str) -> Run:
        config = self._llm.config
        roles = f", roles {as_text(config.roles)}" if config.roles else ""
        return Run(
            source="measured", workload="", model=model, device=find_devices()[0].device_kind,
            gpus=config.topology.num_devices, topology=f"{config.topology}{roles}", policy=policy,
        )  # fmt: skip


class Watch:
    """An engine under a load: what is seen of it meanwhile, and the report at the end."""

    def __init__(self, llm: BaseLLM, facts: Run, dollars: float | None, run: RunWatch) -> None:
        self._llm, self._facts, self._dollars, self._run = llm, facts, dollars, run
        self._before = llm.metrics()
        self.power: Power | None = None

    @property
    def accepted(self) -> Mapping[int, float]:
        """Return when each request was taken in so far, by the engine's id of it."""
        return self._run.accepted

    def measured(self, workload: str, driven: Driven, notes: Sequence[str] = ()) -> Measured:
        """Sum up what was driven, under the workload's name; `notes` are what holds the figures back.

        Raises:
            ValueError: no request ended.
        """
        config = self._llm.config
        start = float(driven.records.column("arrival").min(initial=inf))
        uses = zip(self._run.changes.roles[-1][1], config.topology.meshes, self._run.busy(), strict=True)
        report = LoadReport.of(
            driven.records,
            replace(self._facts, workload=workload, notes=(*notes, *_notes(driven))),
            slo=config.slo,
            meshes=[MeshUse(role=role, gpus=spec.tp, busy=seconds) for role, spec, seconds in uses],
            flips=[replace(flip, t=flip.t - start) for flip in self._run.changes.flips],
            gaps=driven.gaps,
            dollars_per_gpu_hour=self._dollars,
            power=self.power,
            missed_tokens=_missed(self._before, self._llm.metrics()),
            late=Distribution.of(driven.late),
        )
        return Measured(report, driven.records, self._run.series().since(start))


def _missed(before: Metrics, after: Metrics) -> Mapping[str, int]:
    """Return the prompt tokens that were not cached meanwhile, by reason."""
    counts = {reason: count - before.missed_tokens[reason] for reason, count in after.missed_tokens.items()}
    return {reason.value: count for reason, count in counts.items() if count}


def _notes(driven: Driven) -> tuple[str, ...]:
    return tuple(f"{count:,} failed: {error}" for error, count in driven.errors.items())
