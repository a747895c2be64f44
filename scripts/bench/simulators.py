"""Our simulator beside aiconfigurator and AISimulate: the same trace, model and devices, predictions and speed.

    python3.12 -m venv AIC && AIC/bin/pip install aiconfigurator==0.12.0
    python3.12 -m venv AIS && AIS/bin/pip install aisimulate==0.13.0.dev202610270000000085
    python scripts/bench/simulators.py --trace AzureLLMInferenceTrace_conv_2023.csv --aiconfigurator AIC \\
        --aisimulate AIS --json simulators.json

Ours rests on published peaks ("roofline"), theirs on kernels that they measured under vLLM; both give 0.9 of the memory
to an engine and run it in bfloat16. Three tables:

- steps: a prefill of one prompt, and a decode step, by each;
- the trace: TTFT, TPOT and output tokens per second of each topology by our simulator and AISimulate, and requests per
  second of wall time, each on the same core in turn, `--runs` times, the best counts. aiconfigurator takes no traces:
  it is asked for the smallest batch of requests of the trace's mean lengths at which the topology keeps up with the
  trace's mean rate, and says TTFT and TPOT there;
- published figures (`published.py`) beside what each predicts, with its error. Where a model or precision is none of
  ours there is no figure of ours.

A peer whose folder is not given is left out.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from twinmesh.engine.topology import Role, Topology
from twinmesh.scripts.bench import simulator_runs as runs
from twinmesh.scripts.bench.published import PUBLISHED, Published
from twinmesh.scripts.bench.simulator_runs import LATENCIES, SYSTEMS, Setting

MODEL = "meta-llama/Meta-Llama-3.1-8B"
TOPOLOGIES = ("both=1", "both=4", "prefill=1,decode=1", "prefill=3,decode=1", "prefill=16,decode=48*10")
PREFILL = (512, 1024, 2048, 4096, 8192)
DECODE = ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (256, 2048))
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_QUEUED = (64, 128, 256, 512, 1024)
_BACKEND = {"TensorRT-LLM performance page": "trtllm"}  # of published figures; the others are of vLLM


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and return the exit code."""
    args = _arguments(argv)
    peers = {
        name: Path(folder) for name in ("aiconfigurator", "aisimulate") if (folder := getattr(args, name)) is not None
    }
    for name in ("aiconfigurator", "aisimulate"):
        if name not in peers:
            print(f"{name} is left out: give a folder with an environment that has it, --{name} FOLDER.")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, table in (("steps", _steps), ("trace", _trace), ("published", _published)):
        tables[name] = []
        for row in table(peers, args) if name in args.tables else ():
            tables[name].append(row)
            print(_line(row), flush=True)
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "args": vars(args)}
        Path(args.json).write_text(json.dumps(about | tables, indent=1))
    return 0


# ---- steps


def _steps(peers: dict[str, Path], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for device in args.devices:
        found: dict[str, dict[str, Any]] = {"twinmesh": runs.our_steps(args.model, device, PREFILL, DECODE)}
        question = {"ask": "steps", "model": args.model, "system": SYSTEMS[device], "backend": "vllm"}
        for name, folder in peers.items():
            found[name] = runs.ask(folder, [question | {"prefill": PREFILL, "decode": DECODE}], args.core)[0]
        what = [("prefill", f"prefill of {tokens}") for tokens in PREFILL]
        what += [("decode", f"decode of {rows} rows at {tokens}") for rows, tokens in DECODE]
        for place, (phase, name) in enumerate(what):
            index = place if phase == "prefill" else place - len(PREFILL)
            values = {by: steps[phase][index] for by, steps in found.items() if "error" not in steps}
            yield {"setting": f"{device} {name}", "figure": "ms", "values": values}


# ---- the trace


def _trace(peers: dict[str, Path], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for device in args.devices:
        for topology, copies in args.topologies:
            setting = Setting(args.model, device, topology, args.trace, copies, args.requests, not args.devices_alone)
            found: dict[str, dict[str, float]] = {}
            for _ in range(args.runs):
                turn = {"twinmesh": runs.ours_on_trace(setting, args.core)}
                if "aisimulate" in peers:
                    turn["aisimulate"] = runs.aisimulate_on_trace(peers["aisimulate"], setting, args.core)
                for name, figures in turn.items():
                    best = max(figures["requests_per_second"], found.get(name, figures)["requests_per_second"])
                    found[name] = figures | {"requests_per_second": best}
            if "aiconfigurator" in peers:
                found["aiconfigurator"] = keeping_up(peers["aiconfigurator"], setting, args.core)
            for figure in (*LATENCIES, "output tokens/s", "requests_per_second"):
                values = {name: figures[figure] for name, figures in found.items() if figure in figures}
                yield {"setting": setting.name, "figure": figure, "values": values}


def keeping_up(folder: Path, setting: Setting, core: int) -> dict[str, float]:
    """Ask aiconfigurator for TTFT and TPOT at the least batch that keeps up with the trace's mean rate."""
    requests = list(runs.load_of(setting).requests)
    rate = len(requests) / (requests[-1].time - requests[0].time)
    pairs = [(request.prompt_len, request.output_len) for request in requests]
    prompt, output = (round(mean(lengths)) for lengths in zip(*pairs, strict=True))
    meshes = Topology.parse(setting.topology).meshes
    count = {role: sum(spec.role is role for spec in meshes) for role in Role}
    question: dict[str, Any] = {"ask": "estimate", "model": setting.model, "system": SYSTEMS[setting.device]}
    question |= {"backend": "vllm", "isl": prompt, "osl": output, "tp_size": meshes[0].tp}
    for batch in _BATCHES:
        if count[Role.BOTH]:
            asked, many = {"mode": "agg", "batch_size": batch}, count[Role.BOTH]
        else:
            asked, many = {"mode": "disagg", "prefill_batch_size": 1, "decode_batch_size": batch}, 1
            asked |= {"prefill_num_workers": count[Role.PREFILL], "decode_num_workers": count[Role.DECODE]}
        answer = runs.ask(folder, [question | asked], core)[0]
        if "error" not in answer and answer["requests_per_second"] * many >= rate:
            return {"ttft p50": answer["ttft"], "tpot p50": answer["tpot"]}
    return {}


# ---- published figures


def _published(peers: dict[str, Path], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for published in PUBLISHED:
        values = {}
        if published.precision == "bfloat16":
            values["twinmesh"] = _figure(published, runs.ours_on_load(published, args.core))
        if "aisimulate" in peers:
            try:
                values["aisimulate"] = _figure(
                    published, runs.aisimulate_on_load(peers["aisimulate"], published, args.core)
                )
            except SystemExit as error:
                print(error, file=sys.stderr)
        if "aiconfigurator" in peers:
            values |= _estimated(peers["aiconfigurator"], published, args.core)
        errors = {name: value / published.figure - 1 for name, value in values.items()}
        yield {
            "setting": published.name,
            "figure": published.unit,
            "values": {f"published by {published.by}": published.figure} | values,
            "errors": errors,
        }


def _figure(published: Published, figures: dict[str, float]) -> float:
    return figures["tpot p50" if published.unit.startswith("TPOT") else "output tokens/s"]


def _estimated(folder: Path, published: Published, core: int) -> dict[str, float]:
    """Ask aiconfigurator: where all is queued at once, for the batch that is best."""
    question: dict[str, Any] = {"ask": "estimate", "model": published.model, "system": SYSTEMS[published.device]}
    question |= {"backend": _BACKEND.get(published.by, "vllm"), "mode": "agg"}
    question |= {"isl": published.prompt, "osl": published.output} | runs.quantised(published)
    if published.precision == "mxfp4":
        question |= {"moe_tp_size": 1, "moe_ep_size": 1}
    batches = _QUEUED if published.concurrency == published.requests else (published.concurrency,)
    answers = runs.ask(folder, [question | {"batch_size": batch} for batch in batches], core)
    usable = [answer for answer in answers if "error" not in answer]
    if not usable:
        print(f"aiconfigurator: {answers[0]['error']}", file=sys.stderr)
        return {}
    best = max(usable, key=lambda answer: float(answer["tokens_per_second_per_gpu"]))
    value = best["tpot"] if published.unit.startswith("TPOT") else best["tokens_per_second_per_gpu"]
    return {"aiconfigurator": value}


# ---- output


def _line(row: dict[str, Any]) -> str:
    values, errors = row["values"], row.get("errors", {})
    texts = [
        f"{name} {value:,.2f}" + (f" ({errors[name]:+.0%})" if name in errors else "") for name, value in values.items()
    ]
    ratio = ""
    if "aisimulate" in values and "twinmesh" in values and values["aisimulate"]:
        ratio = f"   ours over AISimulate's {values['twinmesh'] / values['aisimulate']:.2f}"
    return f"{row['setting']:44} {row['figure']:20} {'   '.join(texts)}{ratio}"


def topology_of(text: str) -> tuple[str, int]:
    """Read TOPOLOGY, or TOPOLOGY*COPIES."""
    topology, _, copies = text.partition("*")
    try:
        Topology.parse(topology)
        return topology, int(copies or 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no topology with a number of copies: {error}") from None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trace", required=True, metavar="FILE", help="the Azure conversation trace of 2023, or like it"
    )
    parser.add_argument("--model", default=MODEL, help=f"as the peers call it (default: {MODEL})")
    parser.add_argument("--aiconfigurator", metavar="FOLDER", help="an environment with aiconfigurator")
    parser.add_argument("--aisimulate", metavar="FOLDER", help="an environment with aisimulate")
    parser.add_argument("--devices", nargs="+", choices=sorted(SYSTEMS), default=["h100", "h200"])
    parser.add_argument("--topologies", type=topology_of, nargs="+", default=[topology_of(text) for text in TOPOLOGIES],
                        metavar="TOPOLOGY", help="TOPOLOGY*COPIES: with so many copies of the trace at once "
                        f"(default: {' '.join(TOPOLOGIES)})")  # fmt: skip
    parser.add_argument("--tables", nargs="+", choices=["steps", "trace", "published"],
                        default=["steps", "trace", "published"])  # fmt: skip
    parser.add_argument(
        "--runs", type=int, default=3, help="of each on a trace, of which the fastest counts (default: 3)"
    )
    parser.add_argument("--requests", metavar="N", type=int, help="the first N requests of each trace (all)")
    parser.add_argument(
        "--devices-alone", action="store_true",
        help="let our host take no time in the trace's table: the peers know no host",
    )  # fmt: skip
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="which all run on")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
