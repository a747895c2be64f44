"""`twinmesh profile`: measure what steps of an engine cost on this machine, or compute it for a GPU elsewhere."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.options import EngineOptions, documentation
from twinmesh.engine.scheduler.cost_model import CostModel, pairs
from twinmesh.engine.scheduler.policy import policy_named
from twinmesh.engine.simulation.costs.devices import DEVICES
from twinmesh.scripts import arguments

if TYPE_CHECKING:
    from twinmesh.engine.simulation.costs.profile import Profile

_CONTEXT = 1024  # tokens of a row, where one figure is wanted
SUMMARY = "measure what a model's steps cost here, for simulations and plans"
DESCRIPTION = """\
Measure what steps, hand-offs and the host cost: a profile for simulate, plan and whatif.

The engine runs as it would serve, with made-up prompts, for two to ten minutes: prompts and answers of many sizes,
alone and with other meshes at work. Coefficients are fitted to some of what was measured, and the errors for the rest
are printed. With --device nothing runs: the profile is computed from the published peaks of such a GPU, and marked so.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=arguments.written_path,
        help="the profile, a JSON file; an earlier one is replaced once this is complete (default: none is written)",
    )
    parser.add_argument("--quick", action="store_true", help="few loads: rough figures in seconds")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"measure nothing; compute the profile of a GPU that need not be here: {', '.join(DEVICES)}",
    )
    arguments.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from twinmesh.engine.simulation.costs.profile import write_profile

    arguments.check_written(args, ("out", "decision_log"))
    profile = _measured(args) if args.device is None else _computed(args)
    if args.out is not None:
        write_profile(profile, args.out)
        print(f"written to {args.out}")
    return 0


def _measured(args: argparse.Namespace) -> "Profile":
    from twinmesh.engine.simulation.costs.profile import profile_of
    from twinmesh.models.checkpoints.known_models import profile_name
    from twinmesh.scripts.profile_loads import OnMesh
    from twinmesh.scripts.profile_run import ROUNDS, errors_of, fitted, held_out, run_loads, spread_of

    if args.workers is not None:
        raise ValueError("profile measures the devices of this process: leave --workers out.")
    args.policy = OnMesh()
    with arguments.load_llm(args) as llm:
        seen = run_loads(llm, 1 if args.quick else ROUNDS, is_quick=args.quick, progress=True)
    costs = fitted(seen)
    errors, noise = errors_of(held_out(seen, costs)), spread_of(seen, costs)
    print(_table(costs))
    print(f"steps spread   : {noise:9.1%} around these")
    for error in errors:
        print(
            f"{error.kind:8} {error.points:4} points held out: mean error {error.mape:6.1%}, worst {error.worst:6.1%}"
        )
    return profile_of(
        llm.config,
        costs,
        model=profile_name(args.model),
        device=device_here(),
        source="measured",
        date=_now(),
        spread=noise,
        errors=errors,
    )


def _computed(args: argparse.Namespace) -> "Profile":
    """Compute the profile of a device from its published peaks.

    Raises:
        ValueError: an unknown device or model, another dtype than the peaks' own, or what does not fit into memory.
    """
    from twinmesh.engine.simulation.assemble import assemble, source_of
    from twinmesh.engine.simulation.costs.profile import profile_of
    from twinmesh.models.checkpoints.known_models import named_model

    if args.quick:
        raise ValueError("--quick is for a measurement, and with --device nothing is measured: leave one of them out.")
    if args.dtype not in ("auto", "bfloat16"):
        raise ValueError(f"--device computes costs in bfloat16, not in {args.dtype}: leave --dtype out.")
    source, model = source_of(args.device, None), named_model(args.model)
    given = {name: getattr(args, name) for name, option in documentation().items() if option.flag is not None}
    engine = assemble(model.name, model.config, EngineOptions(**given), source, policy_named(args.policy))
    costs = engine.costs
    assert isinstance(costs, CostModel)  # one for all meshes
    print(_table(costs))
    print(source.note)
    return profile_of(engine.config, costs, model=model.name, device=source.device, source="roofline", date=_now())


def _table(costs: CostModel) -> str:
    """Describe what full steps cost: prompts from their start, and rows of 1,024 tokens."""
    lines = []
    for kind, programs in (("prefill", costs.prefill), ("decode", costs.decode), ("fused", costs.fused)):
        for size, program in programs.items():
            own = program.fixed + program.chunk + program.pair * pairs(0, size)
            rows = program.fixed + (program.row + _CONTEXT * program.context) * size
            lines.append(
                f"{kind:8} {size:6}: {1e3 * (rows if kind == 'decode' else own):9.2f} ms, times "
                f"{program.slowdown(1, 0):.2f} beside a prefill and {program.slowdown(0, 1):.2f} beside a decode"
            )
    host, link = costs.host, costs.link
    speed = f" and {1e-9 / link.byte:.2f} GB/s" if link.byte else ""
    lines += [
        f"hand-off       : {1e3 * link.fixed:9.2f} ms{speed}",
        f"host           : {1e3 * host.arrival:9.2f} ms a request, {1e3 * host.step:.2f} ms a step, "
        f"{1e3 * host.read:.2f} ms to read one, {1e3 * host.idle:.2f} ms more for one of an idle mesh",
    ]
    return "\n".join(lines)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_here() -> str:
    """Name the kind of device that engines of this process run on; of CPUs with their number of cores, as meshes share
    them."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["profile", *sys.argv[1:]]))
