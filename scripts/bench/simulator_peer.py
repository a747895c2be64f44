"""One peer's predictions without a trace, for `simulators.py`, in the peer's own Python: aiconfigurator or AISimulate.

    PEER_PYTHON scripts/bench/simulator_peer.py QUESTIONS.json

Needs nothing of Twinmesh. The questions are a list of objects {"ask": "steps" or "estimate", ...} with the arguments of
the function of that name; the last line printed is a list of the answers, in milliseconds and tokens per second, with
{"error": why} where the peer has none.
"""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_IS_AISIMULATE = find_spec("aisimulate") is not None


def main() -> int:
    """Answer the questions and return the exit code."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = [answer(**question) for question in asked]
    print()  # what the peer prints while it loads may end without a newline
    print(json.dumps(answers))
    return 0


def answer(ask: str, **arguments: Any) -> dict[str, Any]:
    """Answer one question; what the peer refuses is no failure of the others."""
    try:
        return steps(**arguments) if ask == "steps" else estimate(**arguments)
    except Exception as error:  # whatever the peer raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def steps(
    model: str, system: str, backend: str, prefill: Sequence[int], decode: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Predict a prefill of one prompt by its tokens, and a decode step by [rows, tokens of KV that each reads]."""
    module = import_module(f"{'aisimulate' if _IS_AISIMULATE else 'aiconfigurator'}_core.sdk.engine")
    engine = module.EngineHandle.compile(model, system, backend)
    return {
        "prefill": [engine.predict_prefill_latency(1, tokens) for tokens in prefill],
        "decode": [engine.predict_decode_latency(rows, tokens, 2) for rows, tokens in decode],
    }


def estimate(model: str, system: str, backend: str, **options: Any) -> dict[str, Any]:
    """Predict a steady load of so many equal requests at once, as `aiconfigurator cli estimate` does."""
    module = import_module("aisimulate.legacy_cli.api" if _IS_AISIMULATE else "aiconfigurator.cli.api")
    found = module.cli_estimate(model, system, backend_name=backend, **options)
    raw = found.raw
    return {
        "ttft": found.ttft,
        "tpot": found.tpot,
        "requests_per_second": raw["seq/s"],
        "tokens_per_second_per_gpu": raw["tokens/s/gpu"],
    }


if __name__ == "__main__":
    sys.exit(main())
