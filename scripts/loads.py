"""What the commands that simulate have in common: the load, the model, and what its steps cost.

Loads are those of `loads/load_spec.py`, and batch files, by the tokenizer of a model at hand. What reads them is
imported when they are read, since every start of a command line imports this.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.models.checkpoints.catalog import CATALOG, resolve_model
from twinmesh.scripts import arguments

if TYPE_CHECKING:
    from twinmesh.engine.batch.request_lines import BatchRequest
    from twinmesh.engine.simulation.workload import Workload

HELP = """\
a load is a file or a generator, with options: FILE, FILE:key=value,... or GENERATOR:key=value,...
  files       CSV with TIMESTAMP, ContextTokens and GeneratedTokens (Azure); JSONL with timestamp, input_length,
              output_length and hash_ids (Mooncake); batch files, where the model is at hand; reports of earlier runs
  poisson     rate (requests/s)
  gamma       rate, cv: the gaps' standard deviation / mean, 0 for an even pace and 1 for poisson
  ramp        rate, to: from one rate to the other within `seconds`; cv
  spike       rate, factor, begin, length: `factor` times the rate for so many seconds; cv
  diurnal     rate (the mean), depth (0.8), period (86400 s): lowest at the start; cv
  closed      concurrency, requests, think (0 s): so many users, each with one request at a time
  sessions    turns, think (mean s): people whose next prompt goes on with all before it, answers included
  agents      turns, tool (mean s): the same with tools, whose results are the input
all           input and output (tokens: 512, or uniform as in 100-900), or lengths=TRACE for its pairs; seed (0)
open loops    seconds, requests, or both: whichever comes first
conversations rate, and seconds or conversations, and cv (1); or, as a closed loop, lanes and conversations
              system (tokens of a prompt that they share, 0), systems (1 of them), opening (tokens of the first
              message), longest (tokens: a turn that would have more is left out, and is the end)
scaling       limit (the first so many), keep (a share), copies (superimposed), faster (times), longer (lengths)
"""


def add_load_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """Declare the load, which may be left out unless it `is_required`, the model, and the device or profile that costs
    are of."""
    parser.add_argument(
        "--trace",
        metavar="LOAD",
        type=arguments.not_empty,
        required=is_required,
        help="a trace or a generator, see above",
    )
    parser.add_argument(
        "--model", metavar="NAME", type=arguments.not_empty, required=True,
        help="a model that is known by name, such as llama-3.1-8b, a fetched one, or a directory with its config.json",
    )  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="h100, h200 or b200; by default the profile's")
    parser.add_argument(
        "--profile", metavar="FILE", type=arguments.read_path, help="costs that `twinmesh profile` has measured"
    )


def read_load(text: str, model: str) -> "Workload":
    """Return the workload that a text stands for; prompts of batch files are counted in tokens of `model`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the text means nothing, a file is no load, or it is a batch file and the model is not here.
    """
    from twinmesh.engine.simulation.loads.load_spec import read_workload

    return read_workload(text, lambda path: _batch_file(path, model))


def _batch_file(path: str, model: str) -> "Workload":
    """Read a batch file. The tokenizer is in the model's files, which are not fetched for that."""
    if model not in CATALOG and not Path(os.path.expanduser(model)).exists():
        raise ValueError(
            f"{path} is a batch file, and {model} is not here to count its tokens: name the model by its own files."
        )
    # What reads batch files and checkpoints imports JAX, which other loads do without.
    from twinmesh.engine.batch.workload import batch_workload
    from twinmesh.models.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer, template = checkpoint.tokenizer(), checkpoint.chat_template()

    def tokens_of(request: "BatchRequest") -> Sequence[int]:
        if request.messages is not None:
            return template.encode(request.messages, tools=request.tools, **request.rendering)
        return tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt or []

    return batch_workload(path, tokens_of)
