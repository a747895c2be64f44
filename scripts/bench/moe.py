"""A mixture of experts beside transformers: tokens per second by number of requests, bytes of weights, peak memory.

    twinmesh bench moe --peer-python PYTHON --json moe.json
    twinmesh bench moe --kind qwen3-moe --peer-python PYTHON --pairs 3 --json moe.json --add

The model is written by `moe_model.py`: random weights, about 100 million of 600 million parameters active, in MXFP4
with GPT-OSS' clamped gates and biases, or in bfloat16. Each turn is a process of its own, and the engine and
transformers take turns; a turn answers 1, 8 and 32 requests of `--prompt` tokens with `--tokens` each, greedily, all at
once, after a first batch that warms it; its rate is that of the whole batch, prompts included. A ratio is that of one
pair of turns; their median and range are printed. The engine has its defaults but for `--dtype` and no prefix cache.
transformers runs in each of `--peer-dtypes`, in turn after each of the engine's, and the best of them counts; bfloat16
is slower than float32 by several times on a CPU without instructions for it.

Memory: bytes of the weights on devices beside those of the file's tensors; and the peak of the process (VmHWM) less
that of one whose model has hardly any weights, beside 1.3 times the file and the KV pool, which is filled. Linux only.
`--add` puts turns to those in the file, so that a run can be made in parts.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinmesh.scripts.bench.moe_model import BARE, KINDS, WHOLE, write_model
from twinmesh.scripts.bench.moe_peer import prompts

_MAX_NUM_SEQS, _KV_BYTES = 32, 64 << 20
type Turn = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Let both take turns, print their figures and return the exit code."""
    args = _arguments(argv)
    if args.turn:
        print(json.dumps(measure(args)), flush=True)
        return 0
    is_there = args.add and args.json and Path(args.json).exists()
    report: dict[str, Any] = json.loads(Path(args.json).read_text()) if is_there else {"pairs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch)
        model = write_model(folder / args.kind, args.kind)
        bare = write_model(folder / f"{args.kind}-bare", args.kind, BARE)
        if "bare" not in report:
            report["bare"] = [_run(_own(args, bare)) for _ in range(2)][1]  # the first may have to compile
        for _ in range(args.pairs):
            pair = {"twinmesh": _run(_own(args, model))}
            if args.peer_python:
                pair |= {dtype: _run(_peers(args, model, dtype)) for dtype in args.peer_dtypes}
            report["pairs"].append(pair)
            report |= summarise(report["pairs"], report["bare"], args.requests)
            _save(report, args)
            print(_rows(report), flush=True)
    return 0


def measure(args: argparse.Namespace) -> Turn:
    """Run the engine's turn and return its figures. Call it in a fresh process."""
    from twinmesh import LLM, SamplingParams

    def params(tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    options: dict[str, Any] = {"max_num_seqs": _MAX_NUM_SEQS, "max_model_len": args.prompt + args.tokens}
    options |= {"dtype": args.dtype, "kv_cache_bytes": _KV_BYTES, "enable_prefix_caching": False}
    figures: Turn = {}
    began = time.perf_counter()
    with LLM(args.turn, **options) as llm:
        figures["start_seconds"] = time.perf_counter() - began
        figures |= _live_bytes() | bytes_in_files(Path(args.turn))
        for count in args.requests:
            llm.generate(prompts(count, args.prompt), params(4))
            start = time.perf_counter()
            outputs = llm.generate(prompts(count, args.prompt), params(args.tokens))
            rate = count * args.tokens / (time.perf_counter() - start)
            figures[str(count)] = {"tokens_per_second": rate, "first": list(outputs[0].outputs[0].token_ids[:16])}
    status = Path("/proc/self/status").read_text()
    figures["peak_bytes"] = 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])
    return figures


def _live_bytes() -> dict[str, int]:
    """Return the bytes of arrays on devices: weights, those of them that stay quantised, and KV pools.

    Of a model of this kind bytes are quantised weights, and an array of five axes is a pool.
    """
    import jax

    found = {
        array.unsafe_buffer_pointer(): (array.ndim == 5, str(array.dtype), array.nbytes) for array in jax.live_arrays()
    }
    weights = [(dtype, size) for is_pool, dtype, size in found.values() if not is_pool]
    return {
        "weight_bytes": sum(size for _, size in weights),
        "kept_bytes": sum(size for dtype, size in weights if dtype == "uint8"),
        "kv_bytes": sum(size for is_pool, _, size in found.values() if is_pool),
    }


def bytes_in_files(model: Path) -> dict[str, int]:
    """Return the bytes of the file's tensors, and of those that are quantised."""
    from safetensors import safe_open

    sizes = []
    with safe_open(model / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(name)
            sizes.append((part.get_dtype(), math.prod(part.get_shape()) * (1 if part.get_dtype() == "U8" else 2)))
    return {"file_bytes": sum(size for _, size in sizes), "packed_bytes": sum(n for kind, n in sizes if kind == "U8")}


def _own(args: argparse.Namespace, model: Path) -> list[str]:
    return [sys.executable, __file__, "--turn", str(model), "--dtype", args.dtype, *_asked(args)]


def _peers(args: argparse.Namespace, model: Path, dtype: str) -> list[str]:
    script = str(Path(__file__).with_name("moe_peer.py"))
    return [args.peer_python, script, "--model", str(model), "--dtype", dtype, *_asked(args)]


def _asked(args: argparse.Namespace) -> list[str]:
    counts = map(str, args.requests)
    return ["--requests", *counts, "--prompt", str(args.prompt), "--tokens", str(args.tokens)]


def _run(command: Sequence[str]) -> Turn:
    """Run a turn and return its figures, the last line that it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"moe: {' '.join(command)[:300]} has ended with {done.returncode}; above is why.")
    figures: Turn = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def summarise(pairs: Sequence[dict[str, Turn]], bare: Turn, counts: Sequence[int]) -> dict[str, Any]:
    """Make rates and ratios by number of requests of the pairs, and the memory's figures of the engine's turns."""
    speed: dict[str, Any] = {}
    for count in map(str, counts):
        own = [pair["twinmesh"][count]["tokens_per_second"] for pair in pairs]
        speed[count] = {"twinmesh": _middle(own)}
        peers = [[turn[count] for name, turn in pair.items() if name != "twinmesh"] for pair in pairs]
        if all(peers):
            best = [max(turn["tokens_per_second"] for turn in turns) for turns in peers]
            speed[count] |= {
                "transformers": _middle(best),
                "ratio": _middle([a / b for a, b in zip(own, best, strict=True)]),
            }
    turn = pairs[-1]["twinmesh"]
    added = statistics.median(pair["twinmesh"]["peak_bytes"] for pair in pairs) - bare["peak_bytes"]
    memory: dict[str, Any] = {
        "weights_over_file": turn["weight_bytes"] / turn["file_bytes"],
        "kept_over_packed": turn["kept_bytes"] / turn["packed_bytes"] if turn["packed_bytes"] else None,
        "added_peak_over_file_and_kv": added / (turn["file_bytes"] + turn["kv_bytes"]),
    }
    memory |= {name: turn[name] for name in ("weight_bytes", "kept_bytes", "file_bytes", "packed_bytes", "kv_bytes")}
    memory["added_peak_bytes"] = added
    return {"speed": speed, "memory": memory}


def _middle(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _save(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform()}
        about["cores"] = os.cpu_count()
        about |= {"args": vars(args), "active_parameters": WHOLE.active}
        Path(args.json).write_text(json.dumps(about | report, indent=1) + "\n")


def _rows(report: dict[str, Any]) -> str:
    lines = [f"{len(report['pairs'])} pairs"]
    for count, figures in report["speed"].items():
        shown = "  ".join(
            f"{name} {value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f})"
            for name, value in figures.items()
        )
        lines.append(f"{count:>3} requests  tokens/s and ratio: {shown}")
    memory = report["memory"]
    lines.append(
        f"weights on devices {memory['weights_over_file']:.3f} of the file's tensors, those that stay quantised "
        f"{memory['kept_over_packed'] or 0:.3f} of theirs; peak less that of the engine "
        f"without weights {memory['added_peak_over_file_and_kv']:.2f} of file and KV"
    )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--folder", metavar="FOLDER", help="keeps the models between runs")
    parser.add_argument("--dtype", default="auto", help="of the engine (default: its own choice)")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has transformers and torch")
    parser.add_argument("--peer-dtypes", nargs="+", default=["float32"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="generated by each request (default: 64)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--add", action="store_true", help="put the turns to those in the file")
    parser.add_argument("--turn", metavar="MODEL", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
