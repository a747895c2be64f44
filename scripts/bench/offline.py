"""Offline throughput against peers: one workload, one machine, one dtype, each engine in a process of its own.

    python scripts/bench/offline.py --json offline.json
    python scripts/bench/offline.py --dtypes float32 bfloat16 --peer-python ~/peers/bin/python --json offline.json

64 prompts of 16 to 512 tokens ask for 16 to 128 tokens each, all at once; greedy, to the last token asked for, no
prefix cache. All engines have the weights as floats of the dtype. They take turns, `--repeats` times; the best of each
counts. Generated tokens per second are over the whole workload, loading and compiling apart. Peers, where
`--peer-python` names a Python that has them: transformers `generate` in padded batches sorted by length (the best of
`--batch-sizes`), and vLLM; of a GGUF file transformers makes the directory that both read, which takes gguf and
accelerate. `ratio_vs_transformers` and `ratio_vs_vllm` are this engine's tokens per second over theirs, null where a
peer is absent or failed. `agreement` is the share of requests with the very same tokens: 16-bit arithmetic differs.

Besides: one request alone (a prompt of 512 tokens), as tokens per second over the floor that reading the weights sets,
at the bandwidth that `machine.py` finds in the same process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ("transformers", "vllm")
MAX_MODEL_LEN = 704


def main(argv: Sequence[str] | None = None) -> int:
    """Let the engines take turns, print a row for each dtype and engine with its ratio, and return the exit code."""
    args = _arguments(argv)
    if args.worker:
        print(json.dumps(measure(json.loads(Path(args.worker).read_text()))))
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="twinmesh-bench-") as scratch:
        for dtype in args.dtypes:
            results.append(compare(dtype, args, Path(scratch)))
            print(_rows(results[-1]), flush=True)
    if args.json:
        machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0))}
        report = {"args": vars(args), "date": time.strftime("%Y-%m-%d"), "machine": machine, "results": results}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def workload(count: int, seed: int) -> dict[str, Any]:
    """Make prompts as token ids, each with how many tokens it asks for; the same for the same seed."""
    random = np.random.default_rng(seed)
    requests = [
        {"prompt": random.integers(100, 20_000, random.integers(16, 513)).tolist(), "tokens": int(tokens)}
        for tokens in random.integers(16, 129, count)
    ]
    return {"requests": requests, "max_model_len": MAX_MODEL_LEN}


def compare(dtype: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run every engine's turns with this dtype; return each one's best turn, and the ratios."""
    work = workload(args.requests, args.seed)
    asked = sum(request["tokens"] for request in work["requests"])
    options = {"model": args.model, "topology": args.topology, "dtype": dtype, "max_num_seqs": args.max_num_seqs}
    (scratch / "work.json").write_text(json.dumps(work | options))
    turns = {"twinmesh": [[sys.executable, __file__, "--worker", str(scratch / "work.json")]]}
    if args.peer_python:
        turns |= peer_turns(dtype, args, scratch)
    best: dict[str, dict[str, Any] | None] = dict.fromkeys(("twinmesh", *PEERS))
    for _ in range(args.repeats):
        for engine, commands in turns.items():
            for command in commands:
                best[engine] = _faster(best[engine], _run(command))
    if best["twinmesh"] is None:
        raise ValueError("Twinmesh itself failed on the workload: the lines above say why.")
    return {"dtype": dtype, "generated_tokens": asked, **ratios(best, asked)}


def peer_turns(dtype: str, args: argparse.Namespace, scratch: Path) -> dict[str, list[list[str]]]:
    """Return the commands of each peer, after converting a GGUF file to the Hugging Face directory that both read."""
    from twinmesh.models.checkpoints.catalog import resolve_model

    script, model = str(Path(__file__).with_name("peer.py")), resolve_model(args.model)
    if model.is_file():
        directory = scratch / "model"
        if not directory.exists():
            save = [args.peer_python, script, "--engine", "save", "--model", str(model), "--workload", str(directory)]
            if subprocess.run(save, stdout=sys.stderr, check=False).returncode:
                raise ValueError(
                    f"{args.peer_python} could not convert {model}: it needs transformers, gguf, accelerate."
                )
        model = directory
    start = [args.peer_python, script, "--model", str(model), "--workload", str(scratch / "work.json")]
    start += ["--dtype", dtype, "--engine"]
    turns = {"transformers": [[*start, "transformers", "--batch-size", str(size)] for size in args.batch_sizes]}
    return {name: turns.get(name, [[*start, name]]) for name in args.peers}


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Run this engine's turn and return its figures. Call it in a fresh process."""
    from twinmesh import LLM, SamplingParams

    options = {name: work[name] for name in ("topology", "dtype", "max_num_seqs", "max_model_len")}
    prompts = [request["prompt"] for request in work["requests"]]
    params = [SamplingParams(temperature=0, max_tokens=r["tokens"], ignore_eos=True) for r in work["requests"]]
    with LLM(work["model"], quantization="none", enable_prefix_caching=False, **options) as llm:
        llm.generate(prompts[:2], params[:2])  # warm
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        alone = llm.generate([(prompts[0] * 512)[:512]], SamplingParams(temperature=0, max_tokens=128, ignore_eos=True))
        tpot = alone[0].timeline.tpot
    return {
        "seconds": seconds,
        "outputs": [output.outputs[0].token_ids for output in outputs],
        "alone": against_the_floor(work["model"], work["dtype"], 1 / tpot if tpot else 0.0),
    }


def against_the_floor(model: str, dtype: str, rate: float) -> dict[str, float]:
    """Compare the tokens per second of one request with what reading the weights once a token would allow."""
    import jax.numpy as jnp
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint
    from twinmesh.models.decoder import abstract_params
    from twinmesh.models.quantized import nbytes
    from twinmesh.scripts.bench.machine import read_rate

    specs = abstract_params(open_checkpoint(resolve_model(model)).config, jnp.dtype(dtype)).specs
    is_tied = "head.weight" not in specs  # otherwise the embedding is looked up, not read
    sizes = {path: nbytes(spec.value) for path, spec in specs.items()}
    weights = sum(size for path, size in sizes.items() if is_tied or path != "embedding.weight")
    memory = read_rate()
    return {
        "tokens_per_second": rate,
        "weight_bytes": weights,
        "memory_bytes_per_second": memory,
        "floor_tokens_per_second": memory / weights,
        "share_of_floor": rate * weights / memory,
    }


def _run(command: list[str]) -> dict[str, Any] | None:
    """Run a process and return the figures that it printed; None if it failed, which its stderr explains.

    They are on one line of its stdout, among lines of other output.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]  # vLLM logs to stdout as well
    if done.returncode or not found:
        print(f"failed with exit code {done.returncode}: {' '.join(command)}", file=sys.stderr)
        return None
    figures: dict[str, Any] = json.loads(found[-1])
    return figures


def _faster(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    return min((turn for turn in (one, other) if turn is not None), key=lambda turn: turn["seconds"], default=None)


def ratios(best: dict[str, dict[str, Any] | None], asked: int) -> dict[str, Any]:
    """Return the figures of each engine, and our speed over that of each peer; null for a peer that is absent."""
    ours = best["twinmesh"]
    assert ours is not None
    result: dict[str, Any] = {"alone": ours.pop("alone")}
    outputs = ours["outputs"]
    for engine, turn in best.items():
        if turn is not None:
            same = sum(a == b for a, b in zip(outputs, turn["outputs"], strict=True))
            kept = {name: value for name, value in turn.items() if name != "outputs"}
            result[engine] = kept | {"tokens_per_second": asked / turn["seconds"], "agreement": same / len(outputs)}
        else:
            result[engine] = None
    for peer in PEERS:
        turn = best[peer]
        result[f"ratio_vs_{peer}"] = None if turn is None else turn["seconds"] / ours["seconds"]
    return result


def _rows(result: dict[str, Any]) -> str:
    lines = []
    for engine in ("twinmesh", *PEERS):
        figures = result[engine]
        rate = "absent" if figures is None else f"{figures['tokens_per_second']:8.1f} tokens/s"
        ratio = result.get(f"ratio_vs_{engine}")
        lines.append(f"{result['dtype']:9} {engine:13} {rate:>18}" + (f"   ratio {ratio:5.2f}" if ratio else ""))
    alone = result["alone"]
    return "\n".join(lines) + (
        f"\n{result['dtype']:9} {'one request':13} {alone['tokens_per_second']:8.1f} tokens/s   "
        f"{alone['share_of_floor']:.2f} of the floor"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--topology", default="both=1")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has transformers, vLLM or both")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32], help="of transformers")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
