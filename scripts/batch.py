"""`twinmesh batch`: a JSONL file of requests in, a JSONL file of results out. The work is in `engine/batch.py`.

`python scripts/batch.py` is the same command; the imports are absolute because a file run that way has no package.
"""

import argparse
import sys

from twinmesh.engine.batch import check_files, run_batch
from twinmesh.scripts import arguments, report

SUMMARY = "run a file of requests and write a file of results"
DESCRIPTION = """\
Run every request of a JSONL file, many at a time, and write one line for each as it finishes.

An input line is an OpenAI batch line
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 64}}
or only what is in its body
  {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
  {"prompt": "Once upon a time", "max_tokens": 32}
Lines without a custom_id are called line-1, line-2, and so on. Output lines have the shape of OpenAI's batch output and
come in the order in which requests finish. A line that cannot be run becomes an output line with an error, and the run
goes on; the exit code is then 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object on each line")
    parser.add_argument("--output", required=True, metavar="FILE", help="results; an existing file is overwritten")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="when done, print the first N prompts with their answers, and a table of latencies, to stdout",
    )
    arguments.add_engine_arguments(parser)
    which = "for the lines that do not say; with --seed, line N without a seed of its own draws with seed + N"
    arguments.add_sampling_arguments(parser, max_tokens=256, temperature=1.0, which=which)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    defaults = arguments.sampling_params(args)
    check_files(args.input, args.output)
    arguments.check_decision_log(args, "input", "output")
    with arguments.load_llm(args) as llm:
        result = run_batch(
            llm,
            args.input,
            args.output,
            model=args.model,
            defaults=defaults,
            keep=args.show,
            progress=True,
        )
    print(report.outcome(result, args.output), file=sys.stderr)
    if args.show:
        print(report.answers(result))
        print(report.latency_table(result))
    return 1 if result.failed else 0


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["batch", *sys.argv[1:]]))
