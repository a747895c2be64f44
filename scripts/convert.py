"""`twinmesh convert SRC DST`: write any model as an Orbax checkpoint, from which every mesh restores its own shards."""

import argparse
import sys
from pathlib import Path

from twinmesh.engine.config import DTYPES
from twinmesh.models.checkpoints.catalog import resolve_model

SUMMARY = "write a model as an Orbax checkpoint"
DESCRIPTION = """\
Write a model as an Orbax checkpoint, from which every device restores its own shard alone.

SRC is whatever --model takes elsewhere. DST is a new directory; it appears when it is complete, and holds the tokenizer
and the chat template as well. Parameters are read and written one at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="a model's name, path or hub id")
    parser.add_argument("destination", metavar="DST", type=Path, help="a directory that does not exist, or is empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the parameters written (default: what SRC has; float32 where quantised)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert the model, print the new directory and return the exit code."""
    from tqdm import tqdm
    from twinmesh.models.checkpoints.open import open_checkpoint
    from twinmesh.models.checkpoints.orbax_writer import write
    from twinmesh.models.decoder import abstract_params

    checkpoint = open_checkpoint(resolve_model(args.source))
    specs = abstract_params(checkpoint.config, args.dtype or checkpoint.dtype).specs
    total = sum(spec.value.size * spec.value.dtype.itemsize for spec in specs.values())
    with tqdm(total=total, desc="parameters", unit="B", unit_scale=True) as bar:
        write(checkpoint, args.destination, args.dtype, bar.update)
    print(args.destination)
    return 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
