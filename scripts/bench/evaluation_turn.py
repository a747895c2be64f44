"""One turn of `evaluation.py`: the two local tasks by lm-evaluation-harness, with its `hf` class or with ours.

    PYTHON scripts/bench/evaluation_turn.py twinmesh|hf --model DIRECTORY --tasks FOLDER

Prints a line of JSON: seconds in each kind of request, loading and compiling apart; results; and every answer. For `hf`
it needs nothing of Twinmesh, and Python 3.10 is enough.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
KINDS = ("loglikelihood", "generate_until")


def main() -> int:
    """Run the turn and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("twinmesh", "hf"))
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--tasks", required=True, help="the folder of the tasks")
    parser.add_argument("--names", nargs="+", default=["local_choice", "local_answer"])
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of the engine, as JSON")
    args = parser.parse_args()
    import lm_eval
    from lm_eval.tasks import TaskManager

    start = time.perf_counter()
    lm = _ours(args) if args.kind == "twinmesh" else _theirs(args)
    figures: dict[str, Any] = {"kind": args.kind, "load_seconds": time.perf_counter() - start}
    seconds = figures["seconds"] = dict.fromkeys(KINDS, 0.0)
    for kind in KINDS:
        setattr(lm, kind, _timed(getattr(lm, kind), kind, seconds))
    found = lm_eval.simple_evaluate(
        lm, tasks=args.names, task_manager=TaskManager(include_path=args.tasks), log_samples=True, bootstrap_iters=0
    )
    figures["results"] = {
        name: {metric: value for metric, value in of.items() if isinstance(value, float) and "stderr" not in metric}
        for name, of in found["results"].items()
    }
    figures["answers"] = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    figures["versions"] = {"lm_eval": lm_eval.__version__, **_versions(args.kind)}
    print(json.dumps(figures))
    return 0


def _ours(args: argparse.Namespace) -> Any:
    from twinmesh.eval import TwinmeshLM

    return TwinmeshLM(args.model, {"dtype": "float32", **args.engine})


def _theirs(args: argparse.Namespace) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch_size)


def _timed(method: Any, kind: str, seconds: dict[str, float]) -> Any:
    def run(*given: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*given, **options)
        finally:
            seconds[kind] += time.perf_counter() - start

    return run


def _versions(kind: str) -> dict[str, str]:
    if kind == "hf":
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}
    import jax

    return {"jax": jax.__version__}


if __name__ == "__main__":
    sys.exit(main())
