"""`twinmesh plan`: which topology to run a model with, on devices that need not be there; or what each would hold.

No JAX in the search of a topology.
"""

import argparse
import json
import sys

from twinmesh.engine.host.progress import say
from twinmesh.engine.host.whole_file import write_whole
from twinmesh.engine.options import EngineOptions, signature
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

With --memory it is the memory plan alone, of one topology and without a load: a table of what each device would hold,
weights by format, KV, staging and temporaries, from config.json alone or a GGUF file's header. It is start-up's own
arithmetic, and a model that does not fit is refused as it would be there. Where something can compile for the device
(the device itself, or JAX's CUDA plugin for an H100), the largest steps are compiled to tell what temporaries they
take, which takes minutes: stderr says how many of them are done, and --no-compile leaves it out.

{HELP}"""

# The options of an engine that only --memory heeds.
MEMORY_OPTIONS = (
    "topology", "dtype", "activations", "page_size", "max_num_seqs", "prefill_buckets", "decode_buckets",
    "memory_fraction",
)  # fmt: skip
_BOTH = ("max_model_len", "kv_cache_bytes", "quantization")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_load_arguments(parser, is_required=False)
    parser.add_argument(
        "--memory", action="store_true",
        help="plan the memory of --topology on --device (also cpu; by default the devices that are here), without a "
        "load or target",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", dest="compiles", action="store_false",
        help="with --memory: compile nothing, temporaries are then an upper bound",
    )  # fmt: skip
    parser.add_argument("--devices", metavar="N", type=arguments.whole_number(1), help="how many of them there are")
    parser.add_argument(
        "--slo", metavar="SLO", type=arguments.slo,
        help="the target: ttft=1000ms,tpot=50ms,percentile=99; without a percentile it is of 99 %% of requests",
    )  # fmt: skip
    arguments.add_simulated_options(parser, (*_BOTH, *MEMORY_OPTIONS))
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
    """Search, or plan memory, print what was found and return the exit code: 0, also where no topology meets the
    target."""
    if args.memory:
        return _plan_memory(args)
    _check_search(args)
    from twinmesh.engine.api.plan_topology import plan_topology
    from twinmesh.engine.simulation.planning.text import as_data, as_text

    arguments.check_written(args, ("json",), arguments.given_files(args))
    answer = plan_topology(
        args.model, devices=args.devices, workload=args.trace, slo=args.slo, device=args.device, profile=args.profile,
        max_model_len=args.max_model_len, kv_cache_bytes=args.kv_cache_bytes, quantization=args.quantization,
        requests=args.requests, budget=args.budget, say=say,
    )  # fmt: skip
    print(as_text(answer), end="")
    if args.json is not None:
        write_whole(args.json, json.dumps(as_data(answer)).encode() + b"\n")
    return 0


def _plan_memory(args: argparse.Namespace) -> int:
    from twinmesh.engine.api.plan_memory import plan_memory
    from twinmesh.engine.simulation.planning.memory_plan import as_data, as_text

    for name in ("trace", "slo", "devices", "profile"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for the search of a topology: leave it out with --memory.")
    arguments.check_written(args, ("json",))
    options = EngineOptions(args.model, **{name: getattr(args, name) for name in (*_BOTH, *MEMORY_OPTIONS)})
    plan = plan_memory(options, device=args.device, compiles=args.compiles, say=say)
    print(as_text(plan), end="")
    if args.json is not None:
        write_whole(args.json, json.dumps(as_data(plan)).encode() + b"\n")
    return 0


def _check_search(args: argparse.Namespace) -> None:
    """Refuse a search without what it needs, or with what it does not heed."""
    missing = [f"--{name}" for name in ("trace", "devices", "slo") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, or --memory, which plans memory alone.")
    defaults = signature().parameters
    # As text, since an argument's default has passed its parser too.
    ignored = [name for name in MEMORY_OPTIONS if str(getattr(args, name)) != str(defaults[name].default)]
    ignored += [] if args.compiles else ["no_compile"]
    if ignored:
        raise ValueError(f"--{ignored[0].replace('_', '-')} goes with --memory: the search chooses what it tries.")


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
