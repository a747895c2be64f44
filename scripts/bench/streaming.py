"""What streams cost the host, beside an earlier checkout: consumers of `AsyncLLM`, over devices that answer at once.

    git worktree add /tmp/before COMMIT
    python scripts/bench/streaming.py --before /tmp/before --json streaming.json

So many coroutines of one event loop each follow a request to its end. The executor is hollow: it computes nothing and
answers a step as soon as every consumer has the step before, so that neither side gets ahead of the other. Reported is
the CPU time of the dispatching thread, of the loop's thread, and of both, per step, while answers have about so many
tokens. The loop's thread detokenises, makes the outputs and hands them out. The earlier checkout gives cumulative
outputs, this one deltas and cumulative ones, of which the consumers read text and ids either way.

The checkouts take turns, each round in a process of its own. The best round counts; all are in the JSON.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parents[2]
_WIDTH = 64  # steps that a figure is taken over
_PROMPT = [5, 6, 7]
# Where efd1214 has the names that moved since, tried after where they are now.
_HOMES = {
    "EngineConfig": ("engine.config",),
    "PoolSize": ("engine.config",),
    "Topology": ("engine.topology", "engine.config"),
    "Scheduler": ("engine.scheduler.scheduler", "engine.scheduler"),
    "EngineCore": ("engine.core.engine_core", "engine.core"),
    "StepResult": ("engine.protocol.results", "engine.executor"),
    "Payloads": ("engine.submission",),
    "Tokenizer": ("models.text.tokenizer", "models.tokenizer"),
    "SpecialTokens": ("models.text.tokenizer", "models.tokenizer"),
    "AsyncLLM": ("engine.api.async_llm", "engine.async_llm"),
    "SamplingParams": ("engine.api.sampling_params", "engine.sampling_params"),
    "RequestOutputKind": ("engine.api.sampling_params",),
}


def _name(name: str) -> Any:
    """A class of the checkout that this process runs; None: it has none."""
    for home in _HOMES[name]:
        try:
            module = import_module(f"twinmesh.{home}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, name):
            return getattr(module, name)
    return None


class HollowExecutor:
    """Answers a step when it is released, each row with the same few tokens in turn."""

    def __init__(self, post: Callable[[Any], None]) -> None:
        self.traffic = SimpleNamespace(transfers=0, bytes=0, seconds=0.0)
        payloads = _name("Payloads")
        self.payloads: Any = None if payloads is None else payloads()
        self._post, self._result = post, _name("StepResult")
        self._steps: list[Any] = []
        self._is_awaited = True  # the next step is to be answered at once
        self.due = 0  # tokens of the step answered last that no consumer has yet

    def perform(self, action: Any) -> None:
        """Take a step in; all else needs nothing here."""
        if type(action).__name__ in ("Prefill", "Decode", "Fused"):
            self._steps.append(action)
            if self._is_awaited:
                self._is_awaited = False
                self.release()
        elif type(action).__name__ == "Finish" and self.payloads is not None:
            del self.payloads[action.request_id]

    def release(self) -> None:
        """Answer the oldest step, or the next one as soon as it is there."""
        if not self._steps:
            self._is_awaited = True
            return
        step = self._steps.pop(0)
        rows = (*getattr(step, "chunks", ()), *getattr(step, "rows", ()))
        self.due = len(rows)
        tokens = np.array([[97 + row.kv_len % 26 for row in rows]], np.int32)
        self._post(self._result(time.monotonic(), step.mesh, step.step, rows, tokens))

    def check_params(self, new: Mapping[str, object]) -> None:
        """Nothing to check."""

    def replace_params(self, new: Mapping[str, object]) -> None:
        """Nothing to replace."""

    def close(self) -> None:
        """Nothing to close."""


class Compilations:
    """None are made."""

    count = 0
    coming = ()

    def prepare_masks(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to close."""


def _tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _name("Tokenizer")(backend, _name("SpecialTokens")())


def _start(requests: int, tokens: int) -> tuple[Any, Any, HollowExecutor]:
    """An `AsyncLLM`, its core and its executor."""
    config = _name("EngineConfig")(
        topology=_name("Topology").parse("both=1"), max_model_len=tokens + 16, max_num_seqs=requests,
        prefill_buckets=(4 * requests,), prefill_rows=requests, decode_buckets=(requests,), prefix_cache=False,
    )  # fmt: skip
    pool = _name("PoolSize")((requests * config.max_pages,), (1,), 0)
    scheduler = _name("Scheduler")(config, [pool])
    made: list[HollowExecutor] = []

    def executor(post: Callable[[Any], None]) -> HollowExecutor:
        made.append(HollowExecutor(post))
        return made[0]

    is_earlier = _name("Payloads") is not None
    core = _name("EngineCore")(scheduler, executor, time.monotonic, *(() if is_earlier else (Compilations(),)))
    engine = SimpleNamespace(core=core, config=config, tokenizer=_tokenizer(), chat_template=None)
    if is_earlier:
        owner: Any = import_module("twinmesh.engine.owner")
        owner.start_engine = lambda model, options: engine
        return _name("AsyncLLM")("hollow"), core, made[0]
    return _name("AsyncLLM").from_engine(engine), core, made[0]


class Meter:
    """Reads both threads' clocks as answers reach certain lengths, and lets the next step go."""

    def __init__(self, requests: int, lengths: Sequence[int], core: Any, executor: HollowExecutor) -> None:
        self._requests, self._core, self._executor = requests, core, executor
        self._marks = {at for length in lengths for at in (length - _WIDTH // 2, length + _WIDTH // 2)}
        self._count = 0
        self.stamps: dict[int, tuple[float, float]] = {}

    def take(self, tokens: int) -> None:
        """A consumer has so many tokens more."""
        self._count += tokens
        self._executor.due -= tokens
        if self._executor.due:
            return
        length = self._count // self._requests
        if length in self._marks and length not in self.stamps:
            self.stamps[length] = self._core.metrics().host_seconds, time.thread_time()
        self._executor.release()


async def _consume(llm: Any, params: Any, meter: Meter, *, is_delta: bool) -> int:
    seen = read = 0
    async for output in llm.generate(_PROMPT, params):
        completion = output.outputs[0]
        count = len(completion.token_ids)
        read += len(completion.text)
        if is_delta:
            meter.take(count)
        else:
            meter.take(count - seen)
            seen = count
    return read


async def _run(args: argparse.Namespace, kind: str) -> list[dict[str, float | int | str]]:
    llm, core, executor = _start(args.requests, max(args.lengths) + _WIDTH)
    kinds = _name("RequestOutputKind")
    options = {} if kinds is None else {"output_kind": kinds[kind]}
    params = _name("SamplingParams")(temperature=0, max_tokens=max(args.lengths) + _WIDTH, ignore_eos=True, **options)
    meter = Meter(args.requests, args.lengths, core, executor)
    gc.collect()
    gc.freeze()
    consumers = [_consume(llm, params, meter, is_delta=kind == "DELTA") for _ in range(args.requests)]
    await asyncio.gather(*consumers)
    await llm.close()
    return [_row(kind, length, meter.stamps) for length in args.lengths]


def _row(kind: str, length: int, stamps: Mapping[int, tuple[float, float]]) -> dict[str, float | int | str]:
    before, after = stamps[length - _WIDTH // 2], stamps[length + _WIDTH // 2]
    dispatch, loop = (1e3 * (b - a) / _WIDTH for a, b in zip(before, after, strict=True))
    return {"kind": kind, "length": length, "dispatch_ms": dispatch, "loop_ms": loop, "both_ms": dispatch + loop}


def main(argv: Sequence[str] | None = None) -> int:
    """Run both checkouts in turn and print a line for each length and kind; returns the exit code."""
    args = _arguments(argv)
    if args.one:
        print(json.dumps(asyncio.run(_run(args, args.one))))
        return 0
    before = Path(args.before).resolve()
    if not (before / "engine").is_dir():
        print(f"streaming: --before {args.before} is no checkout of Twinmesh: it has no engine/.", file=sys.stderr)
        return 2
    runs = {"before": (before, "CUMULATIVE"), "delta": (HERE, "DELTA"), "cumulative": (HERE, "CUMULATIVE")}
    rounds: list[dict[str, Any]] = []
    for index in range(args.rounds):
        order = sorted(runs, reverse=index % 2 == 0)
        rounds.append({name: _process(*runs[name], args) for name in order})
        print(f"round {index + 1} of {args.rounds} done", file=sys.stderr)
    rows = [
        {"what": name, "length": length, **{part: min(r[name][i][part] for r in rounds) for part in _PARTS}}
        for i, length in enumerate(args.lengths)
        for name in runs
    ]
    _print(rows)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "rounds": rounds}, indent=1))
    return 0


_PARTS = ("dispatch_ms", "loop_ms", "both_ms")


def _print(rows: Sequence[dict[str, Any]]) -> None:
    before = {row["length"]: row["both_ms"] for row in rows if row["what"] == "before"}
    for row in rows:
        row["ratio"] = row["both_ms"] / before[row["length"]]
        parts = " ".join(f"{part} {row[part]:7.3f}" for part in _PARTS)
        print(f"{row['what']:12} at {row['length']:5} tokens: {parts}   ratio {row['ratio']:.3f}")


def _process(checkout: Path, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what this script reports of one checkout."""
    from twinmesh.scripts.bench.checkouts import report_of  # earlier checkouts, which run this file too, lack it

    options = ["--one", kind, "--requests", str(args.requests), "--lengths", *map(str, args.lengths)]
    rows: list[dict[str, Any]] = report_of(checkout, __file__, options)
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", default=".", help="a checkout of the earlier commit")
    parser.add_argument("--requests", type=int, default=256, help="consumers (default: 256)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="tokens of the answers so far"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (default: 3)")
    parser.add_argument("--one", metavar="KIND", help="print the figures of the checkout on the path, once")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
