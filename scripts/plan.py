"""`twinmesh plan`: which topology to run a model with, on devices that need not be there. No JAX."""

import argparse
import json
import sys

from twinmesh.engine.host.progress import say
from twinmesh.engine.host.whole_file import write_whole
from twinmesh.engine.simulation.planning.candidates import BUDGET, REQUESTS
from twinmesh.scripts import arguments
from twinmesh.scripts.loads import HELP, add_load_arguments

SUMMARY = "find the topology for a model, devices, a load and a target"
DESCRIPTION = f"""\
Find which topology serves a load within a target: how many devices a mesh has, which meshes prefill, decode or do both.

First the memory plan: a model that does not fit is refused with the arithmetic. Then what fits is ranked by the
planner's prediction, and the best are simulated by the objects that serve, in virtual time: no model is loaded and no
device is needed. Prints the recommended topology with what to expect of it, the runners-up, and what would have to
change: fewer devices that would do, or, where nothing meets the target, how many more, how much later or how much less
load.

{HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_load_arguments(parser)
    parser.add_argument(
        "--devices", metavar="N", type=arguments.whole_number(1), required=True, help="how many of them there are"
    )
    parser.add_argument(
        "--slo", metavar="SLO", type=arguments.slo, required=True,
        help="the target: ttft=1000ms,tpot=50ms,percentile=99; without a percentile it is of 99 %% of requests",
    )  # fmt: skip
    arguments.add_simulated_options(parser, ("max_model_len", "kv_cache_bytes"))
    parser.add_argument(
        "--requests", type=arguments.whole_number(1), default=REQUESTS, metavar="N",
        help="simulate the load's first N requests (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=arguments.whole_number(1), default=BUDGET, metavar="N",
        help="simulate at most N topologies, those predicted to be best (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=arguments.written_path, metavar="FILE", help="write all that was found to a file"
    )


def run(args: argparse.Namespace) -> int:
    """Search, print what was found and return the exit code: 0, also where no topology meets the target."""
    from twinmesh.engine.api.plan_topology import plan_topology
    from twinmesh.engine.simulation.planning.text import as_data, as_text

    arguments.check_written(args, ("json",), arguments.given_files(args))
    answer = plan_topology(
        args.model, devices=args.devices, workload=args.trace, slo=args.slo, device=args.device, profile=args.profile,
        max_model_len=args.max_model_len, kv_cache_bytes=args.kv_cache_bytes, requests=args.requests,
        budget=args.budget, say=say,
    )  # fmt: skip
    print(as_text(answer), end="")
    if args.json is not None:
        write_whole(args.json, json.dumps(as_data(answer)).encode() + b"\n")
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
