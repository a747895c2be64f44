"""`twinmesh bench NAME`: the measurements behind docs/performance.md, each a script of its own beside this file."""

import argparse
from importlib import import_module

BENCHMARKS = {
    "before": "speed beside an earlier checkout, in alternating processes",
    "attention": "attention, append and sampling alone, a layer at a time",
    "generate": "tokens per second of whole batches, by topology and number of requests",
    "handoff": "what handing KV over costs, by prompt length, against a plain copy",
    "host": "what the dispatching thread spends on a step",
    "isolation": "inter-token latency while long prompts arrive, colocated against disaggregated",
    "load": "what loading a model costs: seconds and host memory",
    "machine": "the machine's own limits: arithmetic and memory",
    "offline": "throughput of a whole workload, against transformers and vLLM",
    "policies": "time to first token by policy, over a recorded trace in virtual time",
}
SUMMARY = "measure the engine, or the machine it runs on"
DESCRIPTION = "Run one measurement; 'twinmesh bench NAME --help' lists its arguments.\n\n" + "\n".join(
    f"  {name:<12}{what}" for name, what in BENCHMARKS.items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the measurement")


def run(args: argparse.Namespace) -> int:
    """Run the measurement and return the exit code."""
    module = import_module(f"twinmesh.scripts.bench.{args.name}")  # imports JAX
    code: int = module.main(args.arguments)
    return code
