"""`twinmesh convert SRC DST`: write any model as an Orbax checkpoint, from which every mesh restores its own shards."""

import argparse
import sys
from pathlib import Path

from twinmesh.engine.config import DTYPES, ROUNDINGS
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.scripts import arguments

SUMMARY = "write a model as an Orbax checkpoint"
DESCRIPTION = """\
Write a model as an Orbax checkpoint, from which every device restores its own shard alone.

SRC is whatever --model takes elsewhere. DST is a new directory; it appears when it is complete, and holds the tokenizer
and the chat template as well. Parameters are read and written one at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a model's name, path or hub id")
    parser.add_argument(
        "destination", metavar="DST", type=_new_directory, help="a directory that does not exist, or is empty"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the parameters written (default: what SRC has; quantised ones stay so where they can)",
    )
    parser.add_argument(
        "--quantize",
        choices=ROUNDINGS,
        help="round projections that are floats: int8 and fp8 with a scale for each output, mxfp4 with a power of two "
        "for each 32 inputs (OCP Microscaling Formats 1.0); embedding, head and routers are left as they are",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite; otherwise refused"
    )


def _new_directory(text: str) -> Path:
    return Path(arguments.written_path(text))


def run(args: argparse.Namespace) -> int:
    """Convert the model, print the new directory and return the exit code."""
    from twinmesh.engine.host.progress import Progress
    from twinmesh.engine.sharding.mesh import find_devices
    from twinmesh.models.checkpoints.open import open_checkpoint
    from twinmesh.models.checkpoints.orbax_writer import write, written_bytes

    checkpoint = open_checkpoint(resolve_model(args.source))
    find_devices()  # refuses a platform that is not there before a directory is made
    total = written_bytes(checkpoint, args.dtype, args.quantize)
    with Progress("parameters", total, "B") as line:
        write(
            checkpoint, args.destination, args.dtype, line.advance,
            allow_nonfinite=args.allow_nonfinite, rounding=args.quantize,
        )  # fmt: skip
    print(args.destination)
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
