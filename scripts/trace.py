"""`twinmesh trace LOG -o FILE`: a run's decision log as a timeline that Perfetto shows. No model, no device, no JAX."""

import argparse
import sys

from twinmesh.scripts import arguments

SUMMARY = "turn a run's decision log into a timeline for Perfetto"
DESCRIPTION = """\
Write what a run's decision log tells as a trace in Perfetto's own format: what each mesh did, step by step, and what it
handed over; each request with its phases; a pool's roles and what its planner found; how many requests waited and ran,
and how full the KV pools were. ui.perfetto.dev opens it, in the browser, and sends it nowhere.

It takes the decision log that `--decision-log` or `LLM(..., decision_log=...)` wrote, of any length.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("log", metavar="LOG", type=arguments.read_path, help="a decision log that an engine wrote")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=arguments.written_path, required=True, help="the trace to be written"
    )


def run(args: argparse.Namespace) -> int:
    """Write the trace and return the exit code."""
    from twinmesh.engine.simulation.logs.perfetto_file import check_perfetto, write_trace
    from twinmesh.engine.simulation.logs.replay import DivergedError
    from twinmesh.engine.simulation.logs.timeline import timeline

    check_perfetto()
    arguments.check_new(args.output)
    try:
        write_trace(args.output, timeline(args.log))
    except DivergedError as error:
        print(f"twinmesh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["trace", *sys.argv[1:]]))
