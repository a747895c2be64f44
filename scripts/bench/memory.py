"""Peak memory from start to the end of 32 requests, beside an earlier checkout, in alternating processes.

    git worktree add /tmp/before COMMIT
    python scripts/bench/memory.py --before /tmp/before --json memory.json
    python scripts/bench/memory.py --also 'peer=PEER_PYTHON peer_memory.py'

Each process starts an engine with the defaults of its checkout, answers `--requests` prompts of `--prompt` tokens, all
at once, with `--tokens` tokens each, and is looked at from outside: the peak is the kernel's own (VmHWM), which counts
pages of mapped files too, libraries among them. Anonymous and file pages apart are those of the highest sum that was
seen, every 20 ms. A first process of each checkout compiles, into a cache of its own; it is `cold` and in no median. A
ratio is this checkout's peak over the earlier one's. `bare` is a process that imports JAX and adds two
numbers. `--also` measures any other command. Linux only.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
_EVERY = 0.02  # seconds
_BARE = "import jax, jax.numpy as jnp; jax.block_until_ready(jnp.zeros(1) + 1)"
type Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs of each case and print a line; returns the exit code."""
    args = _arguments(argv)
    if args.run:
        run(args)
        return 0
    checkouts = {"after": HERE} | ({"before": Path(args.before).resolve()} if args.before else {})
    rows = [compare(checkouts, topology, dtype, args) for topology in args.topologies for dtype in args.dtypes]
    others = {"bare": [sys.executable, "-c", _BARE]} | {
        name: shlex.split(command) for name, _, command in (also.partition("=") for also in args.also)
    }
    peaks = {name: watch(command, dict(os.environ)) for name, command in others.items()}
    for name, figures in peaks.items():
        print(json.dumps({"command": name, **figures}), flush=True)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "others": peaks}, indent=1))
    return 0


def run(args: argparse.Namespace) -> None:
    """Answer the requests with the `twinmesh` that this process imports, and stay until stdin ends."""
    from twinmesh import LLM, SamplingParams

    prompts = [[100 + (i * 131 + j) % 10_000 for j in range(args.prompt)] for i in range(args.requests)]
    options: dict[str, Any] = {"topology": args.topologies[0], "dtype": args.dtypes[0]}
    if args.max_model_len:
        options["max_model_len"] = args.max_model_len
    with LLM(args.model, **options) as llm:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True))
        print("done", flush=True)
        sys.stdin.read()


def compare(checkouts: Mapping[str, Path], topology: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the pairs of one case; print and return its row."""
    from twinmesh.scripts.bench.checkouts import environment_of  # earlier checkouts, which run this file too, lack it

    options = ["--run", "--model", args.model, "--topologies", topology, "--dtypes", dtype]
    for name in ("prompt", "tokens", "requests", "max_model_len"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    pairs: list[dict[str, Figures]] = []
    with ExitStack() as stack:
        environments = {}
        for name, checkout in checkouts.items():
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            environments[name] = stack.enter_context(environment_of(checkout)) | {"JAX_COMPILATION_CACHE_DIR": cache}
        for index in range(1 + args.pairs):
            order = sorted(checkouts, reverse=index % 2 == 0)
            pairs.append({name: watch([sys.executable, __file__, *options], environments[name]) for name in order})
    row = {"topology": topology, "dtype": dtype, **summarise(pairs), "pairs": pairs}
    print(json.dumps({name: value for name, value in row.items() if name != "pairs"}), flush=True)
    return row


def summarise(pairs: Sequence[Mapping[str, Figures]]) -> dict[str, Any]:
    """Medians in MB of each checkout over the pairs after the first, its cold peak, and the median of the ratios."""
    row: dict[str, Any] = {}
    for name in pairs[0]:
        row[name] = {
            figure: round(statistics.median(pair[name][figure] for pair in pairs[1:]), 1) for figure in pairs[0][name]
        } | {"cold": round(pairs[0][name]["peak"], 1)}
    if "before" in row:
        row["ratio"] = statistics.median(pair["after"]["peak"] / pair["before"]["peak"] for pair in pairs[1:])
        row["ratio_cold"] = pairs[0]["after"]["peak"] / pairs[0]["before"]["peak"]
    return row


def watch(command: Sequence[str], environment: dict[str, str]) -> Figures:
    """Run a command to its end, or until it has said "done"; return its peak in MB, anonymous and file pages apart."""
    highest: Figures = {"peak": 0.0, "anonymous": 0.0, "file": 0.0}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said = b""
        while process.poll() is None and b"done" not in said:
            _look(process.pid, highest)
            time.sleep(_EVERY)
            said += process.stdout.read() or b""
        if process.poll() is None:
            _look(process.pid, highest)
        process.communicate()
    if process.returncode:
        raise SystemExit(f"memory: {shlex.join(command)[:200]} has ended with {process.returncode}; above is why.")
    return highest


def _look(pid: int, highest: Figures) -> None:
    """Take a process's figures in, in MB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if "VmHWM" not in fields:  # a zombie
        return
    peak, anonymous, file = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "RssAnon", "RssFile"))
    highest["peak"] = max(peak, highest["peak"])
    if anonymous + file > highest["anonymous"] + highest["file"]:
        highest.update(anonymous=anonymous, file=file)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--topologies", nargs="+", default=["both=1", "prefill=1,decode=1"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes after the first (default: 3)")
    parser.add_argument("--requests", type=int, default=32, help="all at once (default: 32)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument("--tokens", type=int, default=32, help="generated by each request (default: 32)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="0: the engine's choice (default: 2048)")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=COMMAND", help="measure another command, too"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
