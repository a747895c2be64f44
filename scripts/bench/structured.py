"""What answers that keep to a JSON schema cost, beside free ones of the same length in the same engine.

    python scripts/bench/structured.py --model smollm2 --json structured.json

Three loads take turns, round by round, each of `--requests` greedy requests with `--tokens` tokens: all free, all with
a schema whose answers are never done before, and one with it beside free ones. Reported for each pair of a round are
tokens per second of all constrained over those of all free, and of the free ones beside one over those of the all-free
load (its same requests), with the medians. Masks are then made once more, alone, along the answers of the last round:
microseconds each. Also reported is what comes once: the vocabulary, the grammar, and the programs for masks.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from twinmesh import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from twinmesh.engine.structured.grammar import Grammars

_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "likes": {"enum": ["tea", "coffee"]}},
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
_SCHEMA = {"type": "array", "items": _PERSON, "minItems": 1000}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="path or name of a model (default: smollm2)")
    parser.add_argument("--requests", type=int, default=32, help="at once (default: 32)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="each of all three loads (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    found = measure(args.model, args.requests, args.tokens, args.rounds)
    print("\n".join(lines(found)))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure(model: str, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Run all rounds, and make masks alone along the last answers."""
    asked = StructuredOutputsParams(json=_SCHEMA)
    free = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    bound = SamplingParams(temperature=0, max_tokens=tokens, structured_outputs=asked)
    prompts = [f"List {index + 2} people as JSON, with name, age and what they like." for index in range(requests)]
    figures: dict[str, list[float]] = {"free": [], "constrained": [], "beside": [], "free_but_one": []}
    with LLM(
        model, topology="both=1", max_model_len=256, max_num_seqs=requests, prefill_buckets=(256,),
        decode_buckets=(requests,), enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        start = time.perf_counter()
        llm.check_sampling_params(bound)
        once = time.perf_counter() - start
        outputs: list[RequestOutput] = []
        for index in range(rounds + 1):
            alone = llm.generate(prompts, free)
            outputs = llm.generate(prompts, bound)
            mixed = llm.generate(prompts, [bound, *[free] * (requests - 1)])
            if index:  # the first round warms up
                figures["free"].append(rate(alone))
                figures["free_but_one"].append(rate(alone[1:]))
                figures["constrained"].append(rate(outputs))
                figures["beside"].append(rate(mixed[1:]))
        masks = mask_times(llm, asked, [output.outputs[0].token_ids for output in outputs])
        compiles = llm.metrics().compiles
    ratios = {
        "constrained_over_free": pairs(figures["constrained"], figures["free"]),
        "free_beside_one_over_free": pairs(figures["beside"], figures["free_but_one"]),
    }
    return {
        "model": model, "requests": requests, "tokens": tokens, "tokens_per_second": figures, "ratios": ratios,
        "median": {name: statistics.median(values) for name, values in ratios.items()}, "mask_us": masks,
        "once_s": once, "compiles": compiles, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("jax", "llguidance")}, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def rate(outputs: Sequence[RequestOutput]) -> float:
    """Return the tokens per second of requests, from the first arrival to the last finish."""
    timelines = [output.outputs[0].timeline for output in outputs]
    end = max(timeline.finish or 0.0 for timeline in timelines)
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    return count / (end - min(timeline.arrival for timeline in timelines))


def pairs(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [one / other for one, other in zip(some, others, strict=True)]


def mask_times(llm: LLM, asked: StructuredOutputsParams, answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """Make every mask of these answers again, alone; return microseconds each, without what follows a token."""
    grammar, seconds, pushed = Grammars(llm.tokenizer).compile(asked), [], []
    for answer in answers:
        matcher = grammar.matcher()
        mask = np.empty(matcher.words, np.int32)
        for token in answer:
            start = time.perf_counter()
            matcher.fill(mask)
            filled = time.perf_counter()
            matcher.push(token)
            seconds.append(filled - start)
            pushed.append(time.perf_counter() - filled)
    found = np.array(seconds) * 1e6
    return {
        "count": len(seconds), "mean": float(found.mean()), "median": float(np.median(found)),
        "p99": float(np.percentile(found, 99)), "most": float(found.max()), "token_mean": float(np.mean(pushed) * 1e6),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """Say the figures in a few lines."""
    masks, median = found["mask_us"], found["median"]
    return [
        f"{found['requests']} constrained requests: {median['constrained_over_free']:.3f} of the tokens/s of free ones "
        f"({', '.join(f'{x:.3f}' for x in found['ratios']['constrained_over_free'])})",
        f"free ones beside one constrained: {median['free_beside_one_over_free']:.3f} "
        f"({', '.join(f'{x:.3f}' for x in found['ratios']['free_beside_one_over_free'])})",
        f"a mask: {masks['mean']:.0f} us, median {masks['median']:.0f}, p99 {masks['p99']:.0f}; a token taken: "
        f"{masks['token_mean']:.0f} us",
        f"once: {found['once_s']:.2f} s for vocabulary, grammar and programs; compiled since: {found['compiles']}",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
