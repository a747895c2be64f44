"""Seconds from the command `twinmesh generate` to its first token, cold and warm, beside an earlier checkout and vLLM.

    git worktree add /tmp/before COMMIT
    python scripts/bench/first_token.py --before /tmp/before --vllm /tmp/vllm/bin/python --json first_token.json

Each process is a whole command: the clock runs from the moment it is started until its first byte of text. Cold: over
a cache folder of its own, in which there is the model's file and nothing else. Warm: the same command over the same
folder once more. Pairs alternate in order, and a ratio is this checkout's seconds over the other's in the same pair.
Files are in the page cache, because a command of each checkout runs before the first that counts. The machine should be
idle.

`--vllm` is a Python that has vllm; it is given the weights as a Hugging Face directory (`--vllm-model`, which
`peer.py --engine save` writes), and its first token comes from `LLM.generate`; once compiling (cold: over an empty
cache of its own), and once with enforce_eager.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmesh.models.checkpoints.catalog import CATALOG, cache_directory
from twinmesh.scripts.bench.checkouts import environment_of

HERE = Path(__file__).resolve().parents[2]
type Seconds = dict[str, float]  # by what was started: "cold" and "warm"

_VLLM = """
import sys, vllm
model, dtype, eager, prompt = sys.argv[1:]
llm = vllm.LLM(model, dtype=dtype, max_model_len=2048, enforce_eager=eager == "eager")
made = llm.generate([prompt], vllm.SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
print("@@", made[0].outputs[0].text, flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs and print a line for each figure; returns the exit code."""
    args = _arguments(argv)
    checkouts = {"after": HERE} | ({"before": Path(args.before).resolve()} if args.before else {})
    for checkout in checkouts.values():  # compiles Python's own files, and brings all files into the page cache
        of_checkout(checkout, args)
    pairs: list[dict[str, Seconds]] = []
    for index in range(args.pairs):
        order = sorted(checkouts, reverse=index % 2 == 0)
        pair = {name: of_checkout(checkouts[name], args) for name in order}
        if args.vllm:
            pair["vllm"], pair["vllm eager"] = (of_vllm(args, mode) for mode in ("compiled", "eager"))
        pairs.append(pair)
        print(json.dumps(pair), file=sys.stderr, flush=True)
    rows = summarise(pairs)
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "pairs": pairs}, indent=1))
    return 0


def of_checkout(checkout: Path, args: argparse.Namespace) -> Seconds:
    """Run the command of a checkout twice over a cache that is empty but for the model."""
    command = [sys.executable, "-m", "twinmesh.scripts.cli", "generate", "--model", args.model, "--prompt", args.prompt]
    command += ["--max-tokens", "4", "--dtype", args.dtype, *args.options]
    with environment_of(checkout) as environment, tempfile.TemporaryDirectory() as cache:
        _link_model(args.model, Path(cache))
        own = {name: value for name, value in environment.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        own["XDG_CACHE_HOME"] = cache
        return {when: first_byte(command, own) for when in ("cold", "warm")}


def of_vllm(args: argparse.Namespace, mode: str) -> Seconds:
    """Start vLLM twice over caches of its own that are empty at first."""
    command = [args.vllm, "-c", _VLLM, args.vllm_model, args.dtype, mode, args.prompt]
    with tempfile.TemporaryDirectory() as cache:
        own = {"VLLM_CACHE_ROOT": cache, "XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"} | own
        return {when: first_byte(command, environment, marker=b"@@") for when in ("cold", "warm")}


def _link_model(model: str, cache: Path) -> None:
    """Put a model of the catalogue where the command will look for it."""
    if model in CATALOG:
        (cache / "twinmesh" / "models").mkdir(parents=True)
        CATALOG[model].cached(cache / "twinmesh").symlink_to(CATALOG[model].cached(cache_directory()))


def first_byte(command: Sequence[str], environment: Mapping[str, str], marker: bytes = b"") -> float:
    """Return the seconds from the command's start until it has written `marker` to stdout, or any byte."""
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as run:
        assert run.stdout is not None
        seen = b""
        while not seen or marker not in seen:
            piece = run.stdout.read(1)
            if not piece:
                break
            seen += piece
        seconds = time.perf_counter() - start
        said = run.communicate()[1]
    if run.returncode or not seen or marker not in seen:
        raise SystemExit(f"first_token: {command[:3]} failed: {said.decode(errors='replace')[-2000:]}")
    return seconds


def summarise(pairs: Sequence[Mapping[str, Seconds]]) -> list[dict[str, Any]]:
    """Make a row for cold and one for warm: medians of each command, and of this checkout's ratios to the others."""
    rows = []
    for when in ("cold", "warm"):
        row: dict[str, Any] = {"start": when}
        for name in pairs[0]:
            values = [pair[name][when] for pair in pairs]
            row[name] = {"median": statistics.median(values), "range": [min(values), max(values)]}
            if name != "after":
                row[f"ratio to {name}"] = statistics.median(pair["after"][when] / pair[name][when] for pair in pairs)
        rows.append(row)
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vllm")
    parser.add_argument("--vllm-model", metavar="DIRECTORY", help="the same weights in Hugging Face's format")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: more arguments of `twinmesh generate`")
    args = parser.parse_args(argv)
    if bool(args.vllm) != bool(args.vllm_model):
        parser.error("--vllm and --vllm-model go together")
    return args


if __name__ == "__main__":
    sys.exit(main())
