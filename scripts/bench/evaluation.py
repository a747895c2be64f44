"""An evaluation by lm-evaluation-harness on an engine beside the harness's own class for transformers.

    twinmesh bench evaluation --hf PYTHON --json evaluation.json

Two local tasks without network (`evaluation_tasks.py`), the same float32 weights in one directory, processes in turn.
`--hf` is a Python with torch, transformers and lm_eval; `--ours` one with Twinmesh and lm_eval. Compared are the
seconds in which requests are answered, without loading and compiling; every log-likelihood; every generated text.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinmesh.scripts.bench.evaluation_tasks import ANSWER, CHOICE, write_directory, write_tasks
from twinmesh.scripts.bench.evaluation_turn import KINDS

TOLERANCE, LEAST_SPEED = 1e-3, 2.0
_TURN = Path(__file__).with_name("evaluation_turn.py")
type Turn = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the turns, print a verdict and return the exit code; `--json` writes the figures."""
    import twinmesh.models

    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = write_directory(Path(folder) / "model", twinmesh.models.load(args.model))
        tasks = write_tasks(Path(folder) / "tasks", args.documents)
        rounds = []
        for number in range(args.rounds):
            order = ("twinmesh", "hf") if number % 2 else ("hf", "twinmesh")
            rounds.append({kind: _run(kind, model, tasks, args) for kind in order})
    report = summarise(rounds)
    print(text_of(report))
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
        }
        given = {"model": args.model, "documents": args.documents, "batch_size": args.batch_size, "engine": args.engine}
        seconds = [{kind: turn["seconds"] for kind, turn in one.items()} for one in rounds]
        Path(args.json).write_text(json.dumps(about | given | report | {"rounds": seconds}, indent=1) + "\n")
    return 0


def summarise(rounds: Sequence[dict[str, Turn]]) -> dict[str, Any]:
    """Compare the turns of all rounds: the largest difference of a log-likelihood, how many verdicts and texts are the
    same, and the median of the ratio of seconds, hf's over ours, by kind of request and in all."""
    ours, theirs = ([one[kind] for one in rounds] for kind in ("twinmesh", "hf"))
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for of_one, of_other in zip(one["answers"][CHOICE], other["answers"][CHOICE], strict=True)
        for a, b in zip(_flat(of_one), _flat(of_other), strict=True)
    ]
    texts = [
        of_one == of_other
        for one, other in zip(ours, theirs, strict=True)
        for of_one, of_other in zip(one["answers"][ANSWER], other["answers"][ANSWER], strict=True)
    ]
    totals = [[sum(turn["seconds"].values()) for turn in turns] for turns in (ours, theirs)]
    speed = {
        kind: statistics.median(b["seconds"][kind] / a["seconds"][kind] for a, b in zip(ours, theirs, strict=True))
        for kind in KINDS
    }
    return {
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "same_greedy": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
        "same_texts": sum(texts) / len(texts),
        "results": {"twinmesh": ours[0]["results"], "hf": theirs[0]["results"]},
        "speed": speed | {"all": statistics.median(b / a for a, b in zip(*totals, strict=True))},
        "versions": ours[0]["versions"] | theirs[0]["versions"],
    }


def text_of(report: dict[str, Any]) -> str:
    """Say in a few lines how the two compare."""
    speed = report["speed"]
    is_equal = report["largest_difference"] <= TOLERANCE
    return (
        f"log-likelihoods: largest difference {report['largest_difference']:.1e} "
        f"({'within' if is_equal else 'NOT within'} {TOLERANCE:g}), is_greedy the same in {report['same_greedy']:.1%}\n"
        f"texts: the same in {report['same_texts']:.1%}\n"
        + "\n".join(f"{kind}: {ratio:.2f} times as fast as hf" for kind, ratio in speed.items())
        + f" ({'reaches' if speed['all'] >= LEAST_SPEED else 'misses'} the aim of {LEAST_SPEED:g})"
    )


def _flat(responses: Any) -> list[tuple[float, bool]]:
    """Take the (log-likelihood, is_greedy) of a document's choices out of the harness's lists."""
    if responses and isinstance(responses[0], int | float):
        return [(float(responses[0]), bool(responses[1]))]
    return [pair for one in responses for pair in _flat(one)]


def _run(kind: str, model: Path, tasks: Path, args: argparse.Namespace) -> Turn:
    command = [
        args.hf if kind == "hf" else args.ours, str(_TURN), kind, "--model", str(model), "--tasks", str(tasks),
        "--batch-size", str(args.batch_size), "--engine", json.dumps(args.engine),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    turn: Turn = json.loads(done.stdout.splitlines()[-1])
    print({"kind": kind, "seconds": turn["seconds"], "results": turn["results"]}, file=sys.stderr, flush=True)
    return turn


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", metavar="PYTHON", required=True, help="a Python with torch, transformers and lm_eval")
    parser.add_argument("--ours", metavar="PYTHON", default=sys.executable, help="a Python with Twinmesh and lm_eval")
    parser.add_argument("--model", default="smollm2", help="a Llama as Twinmesh names it")
    parser.add_argument("--documents", type=int, default=64, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="options of the engine")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
