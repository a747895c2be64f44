"""What a simulated run measured: its load report, with the records and samples behind it."""

from math import inf

from msgspec.structs import replace

from ..metrics.gaps import Gaps
from ..metrics.load_report import LoadReport, MeshUse, Power, Run
from ..metrics.report_file import Measured
from ..roles import as_text
from .assemble import Source
from .simulator import SimulatedEngine, Simulation


def measured_of(
    done: Simulation,
    engine: SimulatedEngine,
    source: Source,
    *,
    workload: str,
    model: str,
    seed: int | None = None,
    gaps: Gaps | None = None,
    dollars_per_gpu_hour: float | None = None,
) -> Measured:
    """Sum up a run; an SLO is the engine's own, a mesh's role the last one, and samples' times are from the first
    arrival.

    Args:
        done: the run, with its records.
        engine: what served it.
        source: of the costs.
        workload: its name.
        model: its name.
        seed: of the noise; None: there is none.
        gaps: between tokens; None: they were not counted.
        dollars_per_gpu_hour: what an hour of a GPU costs; None: what is published of the device.

    Raises:
        ValueError: there are no records.
    """
    config, peaks = engine.config, source.peaks
    roles = f", roles {as_text(config.roles)}" if config.roles else ""
    ran = Run(
        source="simulated", workload=workload, model=model, device=source.device, gpus=config.topology.num_devices,
        topology=f"{config.topology}{roles}", policy=engine.policy.name, seed=seed, notes=(source.note,),
    )  # fmt: skip
    meshes = zip(done.roles[-1][1], config.topology.meshes, done.busy, strict=True)
    start = float(done.records.column("arrival").min(initial=inf))
    published = None if peaks is None else peaks.dollars
    report = LoadReport.of(
        done.records,
        ran,
        slo=config.slo,
        meshes=[MeshUse(role=role, gpus=spec.tp, busy=busy) for role, spec, busy in meshes],
        flips=[replace(flip, t=flip.t - start) for flip in done.flips],
        gaps=gaps,
        dollars_per_gpu_hour=published if dollars_per_gpu_hour is None else dollars_per_gpu_hour,
        power=Power(watts=peaks.watts, basis="name plate") if peaks and peaks.watts else None,
        missed_tokens={reason.value: count for reason, count in done.metrics.missed_tokens.items() if count},
    )
    return Measured(report, done.records, None if done.series is None else done.series.since(start))
