"""`twinmesh replay LOG`: decide once more what a run decided, from its decision log. No model, no device, no JAX."""

import argparse
import sys

from twinmesh.scripts import arguments, report

SUMMARY = "replay a decision log and check that every decision is the same"
DESCRIPTION = """\
Replay the decision log of a run: a new scheduler takes in the same events, and every decision must be the same.

It takes no model and no device. Prints what the run did and how long requests took; if a decision differs, the first
one that does, and the exit code is 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("log", metavar="LOG", type=arguments.read_path, help="a decision log that an engine wrote")


def run(args: argparse.Namespace) -> int:
    """Replay the log, print its summary and return the exit code."""
    from twinmesh.engine.simulation.logs.replay import DivergedError, replay

    try:
        result = replay(args.log)
    except DivergedError as error:
        print(f"twinmesh: {error}", file=sys.stderr)
        return 1
    print(report.replayed(args.log, result))
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["replay", *sys.argv[1:]]))
