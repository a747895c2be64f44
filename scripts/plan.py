"""`twinmesh plan`: which topology to run a model with, on devices that need not be there. No JAX."""

import argparse
import json
import sys
from pathlib import Path

from twinmesh.engine.config import DTYPES
from twinmesh.engine.progress import say
from twinmesh.engine.simulation.plan_search import BUDGET, REQUESTS
from twinmesh.scripts import arguments

SUMMARY = "find the topology for a model, devices, a load and a target"
DESCRIPTION = """\
Find which topology serves a load within a target: how many devices a mesh has, which meshes prefill, decode or do both.

First the memory plan: a model that does not fit is refused with the arithmetic. Then what fits is ranked by the
planner's prediction, and the best are simulated by the objects that serve, in virtual time: no model is loaded and no
device is needed. Prints the recommended topology with what to expect of it, the runners-up, and what would have to
change: fewer devices that would do, or, where nothing meets the target, how many more, how much later or how much less
load.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, metavar="NAME|PATH|ID", help="as llama-3.1-8b; config.json is enough")
    parser.add_argument("--device", required=True, metavar="KIND", help="of the GPUs: h100, h200 or b200")
    parser.add_argument("--devices", required=True, type=arguments.whole_number(1), metavar="N", help="how many")
    parser.add_argument(
        "--trace", required=True, metavar="LOAD", help="a trace, or a generator with options as poisson:rate=5,..."
    )
    parser.add_argument("--slo", required=True, metavar="SLO", help="as ttft=1000ms,tpot=50ms,percentile=99")
    parser.add_argument(
        "--profile", metavar="FILE", help="measured costs of 'twinmesh profile'; by default the device's roofline"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and KV (default: %(default)s)")
    parser.add_argument(
        "--max-model-len", type=arguments.whole_number(2), metavar="N", help="longest prompt and completion together"
    )
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
    from twinmesh.engine.simulation.plan_text import as_data, as_text

    answer = plan_topology(
        args.model, args.device, args.devices, args.trace, args.slo, profile=args.profile, dtype=args.dtype,
        max_model_len=args.max_model_len, requests=args.requests, budget=args.budget, say=say,
    )  # fmt: skip
    print(as_text(answer), end="")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(as_data(answer)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
