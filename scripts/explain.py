"""`twinmesh explain LOG`: why first tokens were late, from a run's decision log. No model, no device, no JAX."""

import argparse
import sys

from twinmesh.scripts import arguments

SUMMARY = "say from a decision log why a request's first token was late"
DESCRIPTION = """\
Divide the time to first token of requests of a run among what they waited for: a seat, pages, a beginning that another
computes, chunks of other prompts, decode steps, the host; the rest is their own work. The parts add up to the time.
Beside them stand the prompts that were computed meanwhile, and whether another mesh stood idle.

It takes the decision log that `--decision-log` or `LLM(..., decision_log=...)` wrote, no model and no device.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("log", metavar="LOG", type=arguments.read_path, help="a decision log that an engine wrote")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--request", type=arguments.whole_number(0), metavar="ID", help="the request with this number in the log"
    )
    which.add_argument(
        "--worst",
        type=arguments.whole_number(1),
        default=10,
        metavar="N",
        help="as many as waited longest for their first token (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, times in seconds")


def run(args: argparse.Namespace) -> int:
    """Explain the requests and return the exit code."""
    import msgspec
    from twinmesh.engine.simulation.logs.explain import explain, worst
    from twinmesh.engine.simulation.logs.explain_text import as_text
    from twinmesh.engine.simulation.logs.logged_run import read_run
    from twinmesh.engine.simulation.logs.replay import DivergedError

    logged = read_run(args.log)
    ids = worst(logged, args.worst) if args.request is None else [args.request]
    if not ids:
        raise ValueError(f"{args.log} has no request with a first token: there is nothing to explain.")
    try:
        found = explain(logged, args.log, ids)
    except DivergedError as error:
        print(f"twinmesh: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(found).decode() + "\n" if args.json else as_text(found), end="")
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["explain", *sys.argv[1:]]))
