"""One turn of transformers in `moe.py`, in the Python that has it: tokens per second by number of requests.

    PEER_PYTHON scripts/bench/moe_peer.py --model DIRECTORY --dtype float32

Needs nothing of Twinmesh; Python 3.10 is enough. Weights in MXFP4 are dequantised, as transformers does without a GPU.
All prompts are equally long, so that no padding is computed. Of the ways in which transformers runs experts each is
tried with a few tokens first, and the fastest is measured, apart for each number of requests.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

_WAYS = ("eager", "grouped_mm")  # "batched_mm" copies each row's experts: ten times as slow from 8 rows on
_TRIED = 3  # tokens


def main() -> int:
    """Run the turn, print its figures as a line of JSON and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options: dict[str, Any] = {}
    if "mxfp4" in (Path(args.model) / "config.json").read_text():
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    model = loaded.to(getattr(torch, args.dtype)).eval()  # MXFP4 becomes bfloat16 whatever was asked for
    figures: dict[str, Any] = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}

    def generate(ids: Any, tokens: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - start, found[:, ids.shape[1] :].tolist()

    for count in args.requests:
        ids, tried = torch.tensor(prompts(count, args.prompt)), {}
        for way in _WAYS:
            model.set_experts_implementation(way)
            generate(ids[:, :8], 2)
            tried[way] = generate(ids[:, :8], _TRIED)[0]
        way = min(tried, key=lambda name: tried[name])
        model.set_experts_implementation(way)
        seconds, outputs = generate(ids, args.tokens)
        rate = count * args.tokens / seconds
        figures[str(count)] = {"tokens_per_second": rate, "way": way, "tried": tried, "first": outputs[0][:16]}
        print(count, figures[str(count)], file=sys.stderr, flush=True)
    print(json.dumps(figures))
    return 0


def prompts(count: int, length: int) -> list[list[int]]:
    """Draw prompts as token ids, the same each time."""
    draws = [random.Random(row) for row in range(count)]
    return [[draw.randrange(100, 20_000) for _ in range(length)] for draw in draws]


if __name__ == "__main__":
    sys.exit(main())
