"""`twinmesh profile`: measure what steps of an engine cost on this machine, or compute it for a GPU elsewhere."""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.simulation.devices import DEVICES
from twinmesh.scripts import arguments

if TYPE_CHECKING:
    from twinmesh.engine.simulation.profile import Profile

SUMMARY = "measure what a model's steps cost here, for simulations and plans"
DESCRIPTION = """\
Measure what steps, hand-offs and the host cost: a profile for simulate, plan and whatif.

The engine runs as it would serve, with made-up prompts, for one to three minutes: prompts and answers of many sizes,
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
    arguments.check_written(args, ("out", "decision_log"))
    profile = _measured(args)
    if args.out is not None:
        from twinmesh.engine.simulation.profile import write_profile

        write_profile(profile, args.out)
        print(f"written to {args.out}")
    return 0


def _measured(args: argparse.Namespace) -> "Profile":
    from twinmesh.engine.simulation.profile import profile_of
    from twinmesh.models.checkpoints.known_models import profile_name
    from twinmesh.scripts.profile_loads import OnMesh
    from twinmesh.scripts.profile_run import errors_of, fitted, held_out, run_loads

    args.policy = OnMesh()
    with arguments.load_llm(args) as llm:
        seen = run_loads(llm, is_quick=args.quick, progress=True)
        config = llm.config
    costs = fitted(seen)
    points = held_out(seen, costs)
    errors = errors_of(points)
    for error in errors:
        print(
            f"{error.kind:8} {error.points:4} points held out: mean error {error.mape:6.1%}, worst {error.worst:6.1%}"
        )
    return profile_of(
        config,
        costs,
        model=profile_name(args.model),
        device=device_here(),
        source="measured",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        errors=errors,
    )


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
