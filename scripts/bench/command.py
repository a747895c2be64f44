"""`twinmesh bench NAME`: the measurements behind docs/performance.md, each a script of its own beside this file."""

import argparse
import os
from importlib import import_module

BENCHMARKS = {
    "before": "speed beside an earlier checkout, in alternating processes",
    "accuracy": "what quantised weights cost in perplexity and greedy tokens, against float32 and llama.cpp",
    "admission": "what the scheduler spends while many requests wait for one prefix, beside an earlier checkout",
    "attention": "attention, append and products alone, a layer at a time",
    "belief": "what a simulation predicts beside what the real engine does, load by load",
    "beside": "interactive latency beside a batch job, and what the job keeps of its throughput",
    "cache": "programs that a start finds compiled after starts with other topologies",
    "driver": "how late the driver of 'serve' sends requests, on an engine that computes nothing",
    "dtype": 'products in float32 and bfloat16, which the choice of dtype="auto" rests on',
    "evaluation": "lm-evaluation-harness on an engine beside its own class for transformers: numbers and speed",
    "first_token": "seconds from the command to its first token, cold and warm, beside an earlier checkout",
    "flip": "gaps between tokens while meshes change their roles, in a spike of long prompts",
    "generate": "tokens per second of whole batches, by topology and number of requests",
    "guidellm": "GuideLLM's own command drives the engine, without HTTP",
    "handoff": "what handing KV over costs, by prompt length, against a plain copy",
    "headline": "bursts of long prompts beside chat: disaggregated against colocated, by rate and chunk",
    "host": "what the dispatching thread spends on a step",
    "load": "what loading a model costs: seconds and host memory",
    "logged": "what a decision log costs, in alternating processes",
    "lost_hosts": "256 simulated hosts of which 5 % are lost within a minute: what it costs, and until when",
    "machine": "the machine's own limits: arithmetic and memory",
    "memory": "peak memory from the start to the end of 32 requests, beside an earlier checkout",
    "metrics": "what metrics for Prometheus cost decode steps, scraped and not",
    "mlperf": "MLPerf's own LoadGen issues, stamps and judges: Server and Offline, with its limits",
    "moe": "a mixture of experts beside transformers: tokens per second, bytes of weights, peak memory",
    "offline": "throughput of a whole workload, against transformers and vLLM",
    "peers": "decode steps, prefill and memory, against llama.cpp, vLLM, transformers and an earlier checkout",
    "planner": "the planner against every static split, colocation and an oracle, on simulated devices",
    "policies": "time to first token by policy, over a recorded trace in virtual time",
    "products": "the products of a model's layers alone, with quantised weights and with floats",
    "report": "the page of a run of 'serve', or of several side by side",
    "routing": "where requests go, against simpler routers, over recorded traces in virtual time",
    "sampler": "the sampler alone, beside an earlier checkout's",
    "scheduler": "what a decision costs, by kind of event, meshes and waiting requests, beside an earlier checkout",
    "serve": "presets of the field and loads of one's own, on the engine or the simulator, with a page of figures",
    "simulators": "the simulator beside aiconfigurator and AISimulate: predictions, and requests per second",
    "simulation": "what the simulator costs a request, by meshes, beside AISimulate",
    "start": "seconds to start an engine that compiles everything, beside an earlier checkout",
    "streaming": "what streams cost the host, beside an earlier checkout",
    "structured": "what answers that keep to a JSON schema cost, beside free ones",
    "threads": "kernels of decode alone, and beside a prefill on another CPU device of the process",
    "whatif": "what a run's log says of another topology beside real runs of that",
    "worker_links": "KV from one process to another, beside memcpy and a bare pull",
    "workers": "what worker processes cost a step, beside the same engine in one process",
}
# Scripts that cannot be named as what they run, whose package they would hide.
_SCRIPTS = {"guidellm": "guidellm_run"}
SUMMARY = "measure the engine, or the machine it runs on"
DESCRIPTION = "Run one measurement; 'twinmesh bench NAME --help' lists its arguments.\n\n" + "\n".join(
    f"  {name:<13}{what}" for name, what in BENCHMARKS.items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the measurement")


def run(args: argparse.Namespace) -> int:
    """Run the measurement and return the exit code."""
    module = import_module(f"twinmesh.scripts.bench.{_SCRIPTS.get(args.name, args.name)}")  # imports JAX
    code: int = module.main([_at_home(argument) for argument in args.arguments])
    return code


def _at_home(argument: str) -> str:
    """Put the user's home for "~" where no shell does, as in --json=~/x."""
    flag, equals, value = argument.partition("=")
    return (
        flag + equals + os.path.expanduser(value) if equals and flag.startswith("--") else os.path.expanduser(argument)
    )
