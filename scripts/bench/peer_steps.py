"""One engine's turn in `peers.py`: decode steps, prefill and memory, in the Python that has the engine.

    PEER_PYTHON scripts/bench/peer_steps.py --engine vllm --model DIRECTORY --dtype float32

Every engine here is a function `run(prompts, tokens)` that answers all prompts at once, greedily and past EOS, and
gives the moment at which it began and the moment of each token; what is made of the moments is the same for all
(`decode_figures`). Prompts are random token ids. One line of JSON is printed. Only Twinmesh's own turn needs anything
of Twinmesh, and then public names alone, so that it runs on earlier checkouts; Python 3.10 is enough. `--engine
convert` writes a GGUF file in another format, by llama.cpp.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Stamps = tuple[float, list[list[float]]]  # the start, and of each request the moments of its tokens
Run = Callable[[list[list[int]], int], Stamps]

SKIPPED = 4  # steps after the last prefill in which its traces may remain
AHEAD = 2  # tokens, for each request, by which the first to be prefilled may be ahead of the last
MAX_MODEL_LEN = 768
MAX_NUM_SEQS = 32
_FORMATS = {"F32": 0, "Q8_0": 7, "BF16": 32}  # numbers of llama.cpp's `llama_ftype`


def main() -> int:
    """Run one engine's turn, print its figures and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=[*ENGINES, "convert"], required=True)
    parser.add_argument("--model", required=True, help="a GGUF file, or a Hugging Face directory")
    parser.add_argument("--dtype", default="float32", help="not of llama.cpp, whose activations are its own affair")
    parser.add_argument("--quantization", help="of Twinmesh; an earlier checkout may have no such option")
    parser.add_argument("--decode-buckets", type=int, nargs="+", help="of Twinmesh (default: the engine's choice)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--prefills", type=int, default=8, help="prompts of the prefill that is measured")
    parser.add_argument("--out", help="of 'convert': the new file")
    parser.add_argument("--format", choices=_FORMATS, help="of 'convert'")
    args = parser.parse_args()
    if args.engine == "convert":
        convert(args)
    else:
        print(json.dumps(measure(args)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the engine, warm it, and take the figures: prefill, then decode by number of requests, then memory."""
    began = time.perf_counter()
    with ENGINES[args.engine](args) as (run, version):
        result: dict[str, Any] = {"version": version, "start_seconds": time.perf_counter() - began}
        run(prompts(2, args.prompt), 4)
        rate = prefill_rate(run(prompts(args.prefills, args.prompt), 1), args.prompt)
        result["prefill"] = {"tokens_per_second": rate}
        result["decode"] = {
            str(count): decode_figures(run(prompts(count, args.prompt), SKIPPED + args.steps + 1), args.steps)
            for count in args.requests
        }
        result["memory"] = memory()
    return result


def prompts(count: int, length: int) -> list[list[int]]:
    """Draw prompts as token ids, the same each time."""
    draws = [random.Random(row) for row in range(count)]
    return [[draw.randrange(100, 20_000) for _ in range(length)] for draw in draws]


def prefill_rate(stamps: Stamps, length: int) -> float:
    """Return the tokens of prompts per second from the start until the last request has its first token."""
    start, tokens = stamps
    return len(tokens) * length / (max(request[0] for request in tokens) - start)


def decode_figures(stamps: Stamps, steps: int) -> dict[str, float]:
    """Make figures of the steps in which every request decodes and none is prefilled.

    They lie between the first token of the request that began last, with `SKIPPED` more, and the last token of the one
    that ended first. A step is the time from one token of the former request to its next. Nothing is a difference
    between two runs.
    """
    _, tokens = stamps
    latest = max(tokens, key=lambda request: request[0])
    end = min(request[-1] for request in tokens)
    window = [moment for moment in latest if moment <= end][SKIPPED : SKIPPED + steps + 1]
    taken = len(window) - 1
    if taken < steps / 2:
        raise SystemExit(f"peer_steps: only {taken} steps of {steps} had all {len(tokens)} requests in them.")
    seconds = window[-1] - window[0]
    made = sum(window[0] < moment <= window[-1] for request in tokens for moment in request)
    return {
        "steps": taken,
        "rows": made / taken,
        "step_ms": 1e3 * seconds / taken,
        "median_step_ms": 1e3 * statistics.median(b - a for a, b in itertools.pairwise(window)),
        "tokens_per_second": made / seconds,
    }


def memory() -> dict[str, float]:
    """Return the peak of this process and its children in MB, and what is anonymous and of files in it now. Linux."""
    total = {"peak": 0.0, "anonymous": 0.0, "file": 0.0}
    waiting = [os.getpid()]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        waiting += [int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()]
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        for name, field in (("peak", "VmHWM"), ("anonymous", "RssAnon"), ("file", "RssFile")):
            total[name] += int(fields.get(field, "0 kB").split()[0]) * 1024 / 1e6
    return total


@contextmanager
def twinmesh(args: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    """Run `LLM.generate`, and take the stamps of its outputs' timelines."""
    from twinmesh import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": args.dtype, "max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}
    if args.quantization:
        options["quantization"] = args.quantization
    if args.decode_buckets:
        options["decode_buckets"] = tuple(args.decode_buckets)
    with LLM(args.model, topology="both=1", enable_prefix_caching=False, **options) as llm:

        def run(prompts: list[list[int]], tokens: int) -> Stamps:
            params = SamplingParams(temperature=0, max_tokens=_with_ahead(prompts, tokens), ignore_eos=True)
            lines = [output.timeline for output in llm.generate(prompts, params)]
            return min(line.arrival for line in lines), [list(line.tokens) for line in lines]

        yield run, "twinmesh"


@contextmanager
def vllm(args: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    """Drive vLLM's engine step by step, with all cores: it would keep one of two for its host."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2" if args.dtype == "float32" else "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    import vllm

    llm = vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    engine = llm.llm_engine
    kind = vllm.sampling_params.RequestOutputKind.DELTA
    names = iter(range(sys.maxsize))

    def run(prompts: list[list[int]], tokens: int) -> Stamps:
        wanted = _with_ahead(prompts, tokens)
        params = vllm.SamplingParams(
            temperature=0, max_tokens=wanted, ignore_eos=True, detokenize=False, output_kind=kind
        )
        found: dict[str, list[float]] = {}
        start = time.perf_counter()
        for prompt in prompts:
            name = str(next(names))
            found[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                found[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return start, list(found.values())

    yield run, f"vllm {vllm.__version__}"


@contextmanager
def transformers(args: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    """Run `generate` on a batch, and take a stamp whenever it asks whether to stop."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()

    def run(prompts: list[list[int]], tokens: int) -> Stamps:
        ids = torch.tensor(prompts)  # [B, T]
        moments: list[float] = []

        def stamp(ids: Any, scores: Any, **_: Any) -> Any:
            moments.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([stamp]),
            )
        return start, [moments] * len(prompts)

    yield run, f"transformers {transformers.__version__}, torch {torch.__version__}"


@contextmanager
def llama_cpp(args: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    """Call llama.cpp's own functions: a sequence a request, and in each decode batch one token of every sequence."""
    import llama_cpp as api
    import numpy as np

    api.llama_backend_init()
    model = api.llama_model_load_from_file(args.model.encode(), api.llama_model_default_params())
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(max(args.prompt, MAX_NUM_SEQS), 0, 1)

    def decode(context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute tokens, each with its position, its sequence, and whether logits are wanted."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted
        if api.llama_decode(context, batch):
            raise SystemExit("peer_steps: llama_decode failed; above is why.")

    def likeliest(context: Any, count: int) -> list[int]:
        logits = np.ctypeslib.as_array(api.llama_get_logits(context), (count, vocabulary))
        return [int(token) for token in logits.argmax(-1)]

    def run(prompts: list[list[int]], tokens: int) -> Stamps:
        context = api.llama_init_from_model(model, _context_options(api, len(prompts)))
        stamps: list[list[float]] = []
        latest: list[int] = []
        start = time.perf_counter()
        for sequence, prompt in enumerate(prompts):
            decode(context, [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)])
            latest += likeliest(context, 1)
            stamps.append([time.perf_counter()])
        for position in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
            decode(context, [(token, position, sequence, True) for sequence, token in enumerate(latest)])
            latest = likeliest(context, len(latest))
            now = time.perf_counter()
            for request in stamps:
                request.append(now)
        api.llama_free(context)
        return start, stamps

    yield run, f"llama-cpp-python {api.__version__}: {api.llama_print_system_info().decode().strip()}"


def _context_options(api: Any, sequences: int) -> Any:
    options = api.llama_context_default_params()
    options.n_seq_max = sequences
    options.n_ctx = sequences * MAX_MODEL_LEN
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    return options


def convert(args: argparse.Namespace) -> None:
    """Write a GGUF file in another format, by llama.cpp's own quantiser."""
    import llama_cpp as api

    options = api.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = _FORMATS[args.format], True
    if api.llama_model_quantize(args.model.encode(), args.out.encode(), ctypes.byref(options)):
        raise SystemExit(f"peer_steps: llama.cpp could not write {args.out}; above is why.")


def _with_ahead(prompts: list[list[int]], tokens: int) -> int:
    """Add what the first request generates while the last is prefilled, so that it stays to the end."""
    return tokens if tokens == 1 else tokens + AHEAD * len(prompts)


ENGINES: dict[str, Any] = {"twinmesh": twinmesh, "vllm": vllm, "transformers": transformers, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    sys.exit(main())
