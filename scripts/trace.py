"""`twinmesh trace`: a run's decision log as a timeline that Perfetto shows."""

import argparse
from pathlib import Path

from twinmesh.scripts import arguments

SUMMARY = "turn a run's decision log into a timeline for Perfetto"
DESCRIPTION = """\
Write what a run's decision log tells as a trace in Perfetto's own format: a track for each mesh, with its steps.
ui.perfetto.dev opens it, in the browser, and sends it nowhere.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("log", metavar="LOG", type=arguments.read_path, help="a decision log, of --decision-log")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=arguments.written_path, required=True, help="the trace to be written"
    )


def run(args: argparse.Namespace) -> int:
    """Write the trace and return the exit code."""
    from twinmesh.engine.simulation.logs.logged_run import read_run
    from twinmesh.engine.simulation.logs.perfetto_file import write_trace
    from twinmesh.engine.simulation.logs.timeline_tracks import slices

    if Path(args.output).exists():
        raise ValueError(f"{args.output} exists: give another name, or move it away.")
    write_trace(args.output, slices(read_run(args.log)))
    return 0
