"""What a logged run would have been under another topology, policy or roles: its load again, by the production
scheduler, with costs that are fitted to that very log.

First the run as it was, simulated: what that gets wrong is the error of everything else here. Both simulations and what
happened are summed up alike, over the requests that had ended when the log did. Where the log has no measurement of
something that is needed, `notes` say so and what stands in for it. Calls for roles happen again in the run as it was
alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as altered
from typing import Literal

import msgspec

from ...config import EngineConfig, PoolSize
from ...metrics.load_report import LoadReport, MeshUse, Run
from ...metrics.request_records import RequestRecords
from ...protocol.service import SLO
from ...roles import starting_roles
from ...scheduler.cost_model import CostModel, LinkCost
from ...scheduler.policy import POLICIES, Policy, policy_named
from ...topology import Topology
from ..costs.devices import peaks_of
from ..costs.fill import filled
from ..incidents import Incident, RolesCalled
from ..simulator import SimulatedEngine, Simulation, simulate
from .log_costs import fit_to
from .log_workload import LoggedLoad, load_of
from .logged_run import LoggedRun


@dataclass(frozen=True)
class Otherwise:
    """What is to be other than it was; None: nothing of that."""

    topology: str | None = None
    roles: str | None = None  # that a pool begins with
    policy: str | None = None
    slo: SLO | None = None  # the engine's

    @property
    def is_anything(self) -> bool:
        """Return whether anything is."""
        return self != Otherwise()


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """What happened, and what would have."""

    happened: LoadReport
    again: LoadReport  # the run as it was, simulated
    otherwise: LoadReport | None  # None: nothing was to be other
    errors: dict[str, float]  # by figure, of `again`: the difference to what happened, as a share of that
    notes: tuple[str, ...]  # what holds the figures back


def what_if(run: LoggedRun, otherwise: Otherwise, costs: CostModel | None = None, *, spread: float = 0.0) -> WhatIf:
    """Simulate a run as it was and as it would have been.

    `costs` are of the run's meshes, and step times spread around them by `spread`, the standard deviation of their
    logarithm; None: both are fitted to the log.

    Raises:
        ValueError: a topology, roles or policy that cannot be, or that the log's costs say nothing about.
    """
    load = load_of(run)
    notes = [] if costs is None else ["costs are of the profile that was given, not of the log"]
    never = ""
    if costs is None:
        costs, spread, never = fit_to(run)
    was = _engine(run, run.header.config, costs, _policy(run, None), notes)
    simulation = simulate(load.workload, was, incidents=(*load.incidents, *_roles_called(run)), noise=spread)
    slo = otherwise.slo or run.header.config.slo  # by which all are judged
    happened, again = _happened(run, load, slo), _report(run, load, was, simulation, slo)
    other = None
    if otherwise.is_anything:
        config = _config(run, otherwise)
        if never and config.topology != run.header.config.topology:
            notes.append(f"{never} on another mesh: they are taken to slow each other down as what ran beside them did")
        engine = _engine(run, config, costs, _policy(run, otherwise.policy), notes)
        other_simulation = simulate(load.workload, engine, incidents=load.incidents, noise=spread)
        other = _report(run, load, engine, other_simulation, slo)
    notes += _left_out(run)
    return WhatIf(
        happened=happened, again=again, otherwise=other, errors=errors_of(again, happened),
        notes=tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def figures_of(report: LoadReport) -> dict[str, float | None]:
    """Return the figures of a report that are compared; times in seconds."""
    found: dict[str, float | None] = {}
    for name, row in (("TTFT", report.ttft), ("TPOT", report.tpot), ("E2E", report.e2e)):
        for percentile in ("p50", "p90", "p99"):
            found[f"{name} {percentile.upper()}"] = None if row is None else getattr(row, percentile)
    found["output tokens/s"] = report.output_tokens_per_second
    found["output tokens/s a GPU"] = report.output_tokens_per_second_per_gpu
    found["goodput, requests/s"] = None if report.goodput is None else report.goodput.per_second
    found["SLO met, share"] = None if report.goodput is None else report.goodput.share
    found["$ per million output tokens"] = None if report.dollars is None else report.dollars.output
    found["utilisation"] = report.utilisation
    return found


def errors_of(predicted: LoadReport, measured: LoadReport) -> dict[str, float]:
    """Return by how much figures differ, as shares of the measured ones; those that either lacks are left out."""
    found = {}
    for name, actual in figures_of(measured).items():
        expected = figures_of(predicted)[name]
        if actual and expected is not None:
            found[name] = expected / actual - 1
    return found


# ---- the engines


def _engine(
    run: LoggedRun, config: EngineConfig, costs: CostModel, policy: Policy, notes: list[str]
) -> SimulatedEngine:
    """Make an engine of this configuration; what the costs lack is stood in for, which `notes` say."""
    _check_meshes(run, config)
    if config.has_handoffs and not run.transfers and costs.link == LinkCost(0.0, 0.0):
        fixed, each = run.header.costs.transfer
        costs = msgspec.structs.replace(costs, link=LinkCost(fixed, each))
        notes.append(
            f"no transfer was measured: one is taken to cost {1000 * fixed:g} ms and {1e9 * each:g} s/GB, as the "
            "scheduler does before it has measured any"
        )
    if len(config.topology.meshes) > 1 == len(run.header.pools):
        notes.append("one mesh ran: how much meshes slow each other down was not measured, and is taken to be nothing")
    if not costs.prefill and costs.fused:
        alone = {b: msgspec.structs.replace(program, row=0.0, context=0.0) for b, program in costs.fused.items()}
        costs = msgspec.structs.replace(costs, prefill=alone)
        notes.append("prompts were computed in fused steps alone: without rows these are taken to cost as much")
    whole = filled(costs, config)
    for kind in ("prefill", "decode", "fused"):
        known, needed = getattr(costs, kind), getattr(whole, kind)
        guessed = [str(bucket) for bucket in sorted(needed) if bucket not in known]
        if guessed:
            notes.append(f"no {kind} step of {', '.join(guessed)} was measured: their costs follow from other sizes")
    return SimulatedEngine(config, _pools(run, config, notes), whole, policy)


def _check_meshes(run: LoggedRun, config: EngineConfig) -> None:
    measured = {spec.tp for spec in run.header.config.topology.meshes}
    wanted = {spec.tp for spec in config.topology.meshes}
    if config.topology != run.header.config.topology and (wanted != measured or len(measured) > 1):
        sizes = " and ".join(str(tp) for tp in sorted(measured))
        raise ValueError(
            f"{run.name} has costs of meshes of tp {sizes}, and {config.topology} has others: ask for a topology whose "
            f"meshes all have tp {min(measured)}, of a run whose meshes all have."
        )


def _pools(run: LoggedRun, config: EngineConfig, notes: list[str]) -> tuple[PoolSize, ...]:
    """Give each mesh the pages that a mesh of the run had; staging for one request, where that had none."""
    had, count = run.header.pools, len(config.topology.meshes)
    pools = [had[min(mesh, len(had) - 1)] for mesh in range(count)]
    if not config.has_handoffs or all(pool.staging_bytes for pool in pools):
        return tuple(pools)
    caps = [config.pages_to_send(window) for window in config.windows]
    notes.append("the run had no hand-offs: each mesh keeps its pages, and has staging for one longest request besides")
    return tuple([altered(pool, staging_bytes=pool.transfer_bytes(config.max_pages, caps)) for pool in pools])


def _config(run: LoggedRun, otherwise: Otherwise) -> EngineConfig:
    config = run.header.config
    topology = config.topology if otherwise.topology is None else Topology.parse(otherwise.topology)
    roles = config.roles if topology == config.topology else ()
    if otherwise.roles is not None or not roles:
        roles = starting_roles(otherwise.roles, topology)
    return altered(config, topology=topology, roles=roles, slo=otherwise.slo or config.slo)


def _policy(run: LoggedRun, name: str | None) -> Policy:
    recorded = run.header.policy
    if name is None and recorded not in POLICIES:
        raise ValueError(f"{run.name} was recorded under the policy {recorded!r}, which Twinmesh does not have.")
    return policy_named(recorded if name is None else name)


def _roles_called(run: LoggedRun) -> Iterator[Incident]:
    """Yield the calls for roles, at their times."""
    for call in run.roles:
        wanted = dict(call.meshes) if call.meshes else ",".join(f"{role}={n}" for role, n in call.counts.items())
        yield RolesCalled(max(0.0, call.t - run.start), wanted, max(1e-3, call.due - call.t))


def _left_out(run: LoggedRun) -> list[str]:
    """Say what happened in the run that no simulation of it has."""
    names = {
        "MeshFailed": "failures of meshes", "TransferFailed": "transfers that failed", "Hold": "updates of parameters",
        "PreemptRequested": "preemptions that were asked for", "MigrateRequested": "migrations that were asked for",
        "ServiceChanged": "requests that were promoted",
    }  # fmt: skip
    notes = [f"{what} ({run.others[name]}) are not simulated" for name, what in names.items() if name in run.others]
    if any(request.facts.fork_of is not None for request in run.requests.values()):
        notes.append("completions of one prompt (n > 1) are simulated as requests that begin alike")
    return notes


# ---- reports


def _happened(run: LoggedRun, load: LoggedLoad, slo: SLO | None) -> LoadReport:
    records = RequestRecords(
        run.requests[id_].record(number)
        for number, id_ in enumerate(load.ids)
        if run.requests[id_].reason is not None
    )  # fmt: skip
    if not len(records):
        raise ValueError(f"{run.name} ends before any request does: there is nothing to compare with.")
    busy = [0.0] * len(run.header.pools)
    for step in run.steps:
        if step.stamps is not None:
            busy[step.stamps.mesh] += step.stamps.done - step.stamps.begun
    return _sum_up(run, records, run.header.config, run.header.policy, busy, "measured", slo)


def _report(
    run: LoggedRun, load: LoggedLoad, engine: SimulatedEngine, simulation: Simulation, slo: SLO | None
) -> LoadReport:
    records = RequestRecords(
        record for record in simulation.records if run.requests[load.ids[record.number]].reason is not None
    )
    return _sum_up(run, records, engine.config, engine.policy.name, simulation.busy, "simulated", slo)


def _sum_up(
    run: LoggedRun,
    records: RequestRecords,
    config: EngineConfig,
    policy: str,
    busy: Sequence[float],
    source: Literal["measured", "simulated"],
    slo: SLO | None,
) -> LoadReport:
    meshes = config.topology.meshes
    peaks = peaks_of(run.run.device)
    return LoadReport.of(
        records,
        Run(
            source=source,
            workload=run.name,
            model=run.run.name or run.run.model.family,
            device=run.run.device,
            gpus=config.topology.num_devices,
            topology=str(config.topology),
            policy=policy,
        ),
        slo=slo,
        meshes=[
            MeshUse(role=config.starting_role(mesh).value, gpus=meshes[mesh].tp, busy=seconds)
            for mesh, seconds in enumerate(busy)
        ],
        dollars_per_gpu_hour=None if peaks is None else peaks.dollars,
    )
