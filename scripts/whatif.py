"""`twinmesh whatif LOG`: what a run would have been under another topology, from its decision log. No model, no JAX."""

import argparse
import sys

from twinmesh.scripts import arguments

SUMMARY = "simulate a run from its decision log under another topology, policy or roles"
DESCRIPTION = """\
Let the requests of a run come again, under another topology, policy or roles, with costs that are fitted to that run's
own log; the scheduler is the one that serves. The run as it was is simulated too: what that gets wrong stands first.

It takes the decision log that `--decision-log` or `LLM(..., decision_log=...)` wrote, no model and no device.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("log", metavar="LOG", type=arguments.read_path, help="a decision log that an engine wrote")
    parser.add_argument("--topology", metavar="T", help="the meshes, such as prefill=1,decode=1 or pool=2")
    parser.add_argument("--roles", metavar="R", help="that the meshes of a pool begin with, such as prefill=1,both=1")
    parser.add_argument("--policy", metavar="P", help="fcfs or spf")
    parser.add_argument("--slo", metavar="S", help="what answers are to keep to, such as ttft=500ms,tpot=50ms")
    parser.add_argument(
        "--profile", type=arguments.read_path, metavar="F", help="take the costs from a profile, not from the log"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, times in seconds")


def run(args: argparse.Namespace) -> int:
    """Simulate, print both sides and return the exit code."""
    import msgspec
    from twinmesh.engine.protocol.service import read_slo
    from twinmesh.engine.simulation.costs.profile import check_profile, read_profile
    from twinmesh.engine.simulation.logs.logged_run import read_run
    from twinmesh.engine.simulation.logs.whatif import Otherwise, what_if
    from twinmesh.engine.simulation.logs.whatif_text import as_text

    slo = None if args.slo is None else read_slo(args.slo)
    logged = read_run(args.log)
    costs, spread = None, 0.0
    if args.profile is not None:
        profile = read_profile(args.profile)
        known = logged.run
        check_profile(profile, logged.header.config, model=known.name, device=known.device, name=str(args.profile))
        costs, spread = profile.costs, profile.spread
    found = what_if(logged, Otherwise(args.topology, args.roles, args.policy, slo), costs, spread=spread)
    print(msgspec.json.encode(found).decode() + "\n" if args.json else as_text(found), end="")
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["whatif", *sys.argv[1:]]))
