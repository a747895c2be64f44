"""What quantised weights and activations cost in accuracy, against the same weights dequantised to float32.

    python scripts/bench/accuracy.py --model smollm2 --llama-cpp PYTHON --json accuracy.json

A prompt's tokens are scored by engines, in windows: `--tokens` of the prose in this checkout's docs, or of `--text`.
The reference runs with quantization="none" in float32, the others as `--ways` says: QUANTIZATION:DTYPE, and what
activations are rounded to behind another colon (auto:float32:int8). Chunks are short, so that every product has the
few rows for which CPUs have kernels of their own. With `--llama-cpp`, a Python that has llama-cpp-python, llama.cpp
scores the same tokens with the file as it is. Reported for each: the perplexity over the reference's, and at how many
positions the most likely next token is the reference's.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_REFERENCE = "none:float32"
_LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
model, threads, windows = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
llm = Llama(model, n_ctx=max(map(len, windows)), n_threads=threads, n_threads_batch=threads, logits_all=True,
            verbose=False)
found = {"logprobs": [], "likeliest": []}
for ids in windows:
    llm.reset()
    llm.eval(ids)
    logits = np.array(llm.scores[: len(ids) - 1], np.float64)
    most = logits.max(-1, keepdims=True)
    logprobs = logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))
    found["logprobs"] += logprobs[np.arange(len(ids) - 1), ids[1:]].tolist()
    found["likeliest"] += logits.argmax(-1).tolist()
print(json.dumps(found))
"""


class Scores(NamedTuple):
    """Of every token but the first of each window."""

    logprobs: list[float]
    likeliest: list[int]  # the most likely token in its place

    @property
    def perplexity(self) -> float:
        """Return exp of the mean of what the tokens' log-probabilities lack."""
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


def main(argv: Sequence[str] | None = None) -> int:
    """Score, and print a row for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", metavar="FILE", help="prose to score (default: this checkout's guides)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    parser.add_argument(
        "--ways", nargs="+", default=["auto:float32", "auto:bfloat16"], metavar="QUANTIZATION:DTYPE[:ACTIVATIONS]"
    )
    parser.add_argument("--rows", type=int, default=32, help="tokens of a step")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    windows = _windows(args)
    found = {way: score(args.model, way, windows, args.rows) for way in dict.fromkeys((_REFERENCE, *args.ways))}
    if args.llama_cpp:
        found["llama.cpp"] = score_by_llama_cpp(args.llama_cpp, args.model, windows)
    rows = compare(found)
    for row in rows:
        print(
            f"{row['way']:16} perplexity {row['perplexity']:8.4f} ({row['perplexity_ratio']:.4f})  "
            f"greedy token equal {row['agreement']:.4f}  largest difference of a log-probability {row['worst']:.3f}"
        )
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def compare(found: dict[str, Scores]) -> list[dict[str, Any]]:
    """Hold each way's scores against the first one's."""
    reference, *_ = found.values()
    rows = []
    for way, scores in found.items():
        equal = sum(a == b for a, b in zip(scores.likeliest, reference.likeliest, strict=True))
        rows.append(
            {
                "way": way,
                "perplexity": scores.perplexity,
                "perplexity_ratio": scores.perplexity / reference.perplexity,
                "agreement": equal / len(reference.likeliest),
                "worst": max(abs(a - b) for a, b in zip(scores.logprobs, reference.logprobs, strict=True)),
            }
        )
    return rows


def _windows(args: argparse.Namespace) -> list[list[int]]:
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint

    files = [Path(args.text)] if args.text else sorted((_ROOT / "docs" / "guides").glob("*.md"))
    ids = open_checkpoint(resolve_model(args.model)).tokenizer().encode("\n".join(file.read_text() for file in files))
    if len(ids) < args.tokens:
        raise SystemExit(f"The text has {len(ids)} tokens, fewer than --tokens {args.tokens}: give a longer one.")
    return [list(ids[start : start + args.window]) for start in range(0, args.tokens, args.window)]


def score(model: str, way: str, windows: list[list[int]], rows: int) -> Scores:
    """Score the windows by an engine."""
    from twinmesh import LLM, SamplingParams

    quantization, dtype, *rounded = way.split(":")
    longest = max(map(len, windows)) + 1
    options: dict[str, Any] = dict(max_model_len=longest, prefill_buckets=(rows,), max_num_seqs=1, decode_buckets=(1,))
    if rounded:
        options["activations"] = rounded[0]
    with LLM(model, quantization=quantization, dtype=dtype, progress=True, **options) as llm:
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        outputs = llm.generate(windows, asked)
    logprobs, likeliest = [], []
    for ids, output in zip(windows, outputs, strict=True):
        for token, at in zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True):
            assert at is not None
            logprobs.append(at[token].logprob)
            likeliest.append(next(id_ for id_, one in at.items() if one.rank == 1))
    return Scores(logprobs, likeliest)


def score_by_llama_cpp(python: str, model: str, windows: list[list[int]]) -> Scores:
    """Score the windows by llama.cpp, with the file's weights as they are."""
    from twinmesh.models.checkpoints.catalog import resolve_model

    command = [python, "-c", _LLAMA_CPP, str(resolve_model(model)), str(len(os.sched_getaffinity(0)))]
    done = subprocess.run(command, input=json.dumps(windows), capture_output=True, text=True, check=True)
    return Scores(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
