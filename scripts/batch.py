"""`twinmesh batch`: a file of requests in, a file of results out. The work is in `engine/batch/`.

`python scripts/batch.py` is the same command; the imports are absolute because a file run that way has no package.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.batch.lateness import ON_LATE, check_late
from twinmesh.engine.batch.paths import Output
from twinmesh.engine.batch.session import Batch
from twinmesh.engine.batch.source import STDIN
from twinmesh.engine.batch.summary import BatchResult
from twinmesh.engine.host.whole_file import write_whole
from twinmesh.engine.topology import Topology
from twinmesh.scripts import arguments, report, sampling_arguments

if TYPE_CHECKING:
    from twinmesh.engine.api.llm import LLM

SUMMARY = "run a file of requests and write a file of results"
DESCRIPTION = """\
Run every request of a file, many at a time, and write one line for each as it finishes. A run that was stopped, killed
or lost its power goes on when the same command is given again: no result is computed twice.

An input line is an OpenAI batch line
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 64}}
or only what is in its body
  {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
  {"prompt": "Once upon a time", "max_tokens": 32}
Lines without a custom_id are called line-1, line-2, and so on. Output lines have the shape of OpenAI's batch output and
come in the order in which requests finish. A line that cannot be run becomes an output line with an error, and the run
goes on. Files named .parquet or .pq are Parquet, a row for a line, results in the order of the input.
"""
EPILOG = """\
examples:
  twinmesh batch --model smollm2 --input in.jsonl --output out.jsonl --topology prefill=1,decode=1
  twinmesh batch --model smollm2 --input in.parquet --output out.parquet --summary summary.json --gpu-hour-price 2.5
  zcat in.jsonl.gz | twinmesh batch --model smollm2 --input - --output out.jsonl

A run goes on only with the same model, input, sampling arguments, --chat-template-kwargs, --dtype,
--kv-cache-dtype, --quantization, --activations, --deterministic, --tool-call-parser and --reasoning-parser; what it
was made with is in OUTPUT.run. Everything else may change from start to start. While it runs, nobody else may write to
the output.

exit codes:
  0    every line has a result
  1    every line was run, and some have an error; or the summary could not be written; or an internal failure
  2    the input, the output or an argument cannot be used: nothing was done
  3    stopped early, because the disk is full, the engine failed, or input or output were changed meanwhile: the same
       command goes on
  130  stopped by Ctrl-C, 143 by SIGTERM: the same command goes on
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--input",
        required=True,
        type=arguments.read_path,
        metavar="FILE",
        help="requests; '-' reads JSON lines from stdin",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=arguments.read_path,
        metavar="FILE",
        help="results; those of the same run are kept",
    )
    parser.add_argument("--restart", action="store_true", help="overwrite the output instead of going on with it")
    parser.add_argument("--retry-errors", action="store_true", help="run lines again that have an error in the output")
    parser.add_argument(
        "--deadline",
        type=_seconds,
        metavar="SECONDS",
        help="from the first line on, in which the last is wanted; a run that will be late says so once, and goes on",
    )
    parser.add_argument(
        "--on-late",
        choices=ON_LATE,
        default="say",
        help="what a run that will be late does besides: run the rest as interactive requests are, before other batch "
        "work (promote), or nothing (say)",
    )
    parser.add_argument(
        "--summary",
        type=arguments.written_path,
        metavar="FILE",
        help="write counts, rates, latencies and costs as JSON when done",
    )
    parser.add_argument(
        "--gpu-hour-price",
        type=_price,
        metavar="DOLLARS",
        help="of one device for an hour, for the costs in the summary",
    )
    parser.add_argument(
        "--show",
        type=arguments.whole_number(0),
        default=0,
        metavar="N",
        help="when done, print the first N prompts with their answers, and a table of latencies, to stdout",
    )
    arguments.add_metrics_port(parser)
    sampling_arguments.add_template_variables(parser, "for conversations of lines that do not say")
    arguments.add_engine_arguments(parser)
    which = "for the lines that do not say; a line without a seed of its own draws one from --seed and its number"
    sampling_arguments.add_sampling_arguments(parser, max_tokens=256, temperature=1.0, which=which)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    defaults = sampling_arguments.sampling_params(args)
    check_late(args.deadline, args.on_late)
    arguments.check_written(args, ("decision_log", "summary"), _files(args))
    with (
        arguments.metrics_port(args) as show,
        Batch(
            args.input,
            args.output,
            model=args.model,
            defaults=defaults,
            engine={
                "dtype": args.dtype,
                "kv_cache_dtype": args.kv_cache_dtype,
                "quantization": args.quantization,
                "activations": args.activations,
                "deterministic": args.deterministic,
                "tool_call_parser": args.tool_call_parser,
                "reasoning_parser": args.reasoning_parser,
            },
            restart=args.restart,
            retry_errors=args.retry_errors,
            chat_template_kwargs=args.chat_template_kwargs,
        ) as batch,
    ):
        result, devices = _run(batch, args, show)
    print(report.outcome(result, args.output), file=sys.stderr)
    has_run = result.finished > result.resumed
    if args.summary and (has_run or not Path(args.summary).exists()):
        figures = result.summary(devices=devices, device_hour_price=args.gpu_hour_price)
        # As a whole, because a later start that has nothing left to do leaves it as it is.
        write_whole(args.summary, json.dumps(figures, indent=1).encode() + b"\n")
    if args.show:
        print(report.answers(result))
        print(report.latency_table(result))
    return 1 if result.failed else 0


def _files(args: argparse.Namespace) -> list[tuple[Path, str]]:
    """List the files that the run reads and writes, each with what it is."""
    output = Output(args.output)
    written = [(path, "the output file") for path in output.files[:1]]
    written += [(path, "a file of the run, beside its output") for path in output.files[1:]]
    return written if args.input == STDIN else [(Path(args.input), "the input file"), *written]


def _run(batch: Batch, args: argparse.Namespace, show: Callable[["LLM"], None]) -> tuple[BatchResult, int]:
    """Run what is left, of which `show` shows the figures; return what became of it, and on how many devices."""
    if batch.remaining == 0:  # no engine starts: none, where it would have chosen them
        return batch.finish(), args.topology.num_devices if isinstance(args.topology, Topology) else 0
    with arguments.load_llm(args) as llm:
        show(llm)
        result = batch.run(llm, keep=args.show, progress=True, deadline=args.deadline, on_late=args.on_late)
        topology = args.topology if isinstance(args.topology, Topology) else llm.config.topology
        return result, topology.num_devices


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not usable: give a number of seconds above 0")
    return seconds


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a price: give dollars, 0 or more")
    return price


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["batch", *sys.argv[1:]]))
