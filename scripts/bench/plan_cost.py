"""What one plan of a pool's roles costs the dispatching thread: CPU milliseconds, the best of `--repeats`.

    python scripts/bench/plan_cost.py --meshes 4 8 64 2048

Observations are made up: answers of 211 tokens to prompts of 1,155, at rates that the meshes serve easily ("met") and
at twice what they can ("over"), from a memory of 256 s. Three parts of what happens every `Rules.interval` seconds:
demand is read from the memory; a plan is predicted; or what is seen is found to be as it was, and nothing is.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.scheduler.alike import are_alike
from twinmesh.engine.scheduler.demand import DemandWindow
from twinmesh.engine.scheduler.line_fit import Terms
from twinmesh.engine.scheduler.observations import MeshSize, Observations, Queues, Split, StepTimes
from twinmesh.engine.scheduler.planner import RULES, plan

TARGET = SLO(ttft_ms=1000, tpot_ms=25, percentile=95)
TIMES = StepTimes(Terms(0.005, 0.00005), Terms(0.005, 0.00006), 0.01, is_measured=True)
SIZE = MeshSize(chunk=512, prompts=8, slots=48, tokens=4096 * 64, is_fused=True)
PROMPT, ANSWER = 1155, 211
RATES = {"met": 5.0, "over": 24.0}  # requests a second for each mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each pool and rate, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", nargs="+", type=int, default=[4, 8, 64, 2048], help="default: 4 8 64 2048")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args(argv)
    for meshes in args.meshes:
        for name, rate in RATES.items():
            window = _window(rate * meshes)
            now = RULES.memory * RULES.bin_seconds
            seen = Observations(
                Split(0, 0, meshes), window.demand(now), Queues(0.0, 0.0, 0, 0.0, 0), TIMES, SIZE,
            )  # fmt: skip
            as_before = replace(seen, queues=replace(seen.queues, decoding=1))
            parts: dict[str, Callable[[], object]] = {
                "demand": partial(window.demand, now),
                "plan": partial(plan, seen, TARGET),
                "as before": partial(are_alike, seen, as_before, or_easier=False),
            }
            cost = ", ".join(f"{part} {_milliseconds(call, args.repeats):.2f} ms" for part, call in parts.items())
            print(f"{meshes} meshes, {name} ({plan(seen, TARGET).reason}): {cost}", flush=True)
    return 0


def _window(rate: float) -> DemandWindow:
    """Return a memory full of requests; of many only so many are counted apart, which costs the same to read."""
    window = DemandWindow(RULES.bins, RULES.bin_seconds, RULES.pairs, RULES.memory)
    for k in range(int(rate * RULES.memory * RULES.bin_seconds)):
        window.arrived(k / rate, PROMPT // 2 + k % PROMPT)
        if k % 8 == 0:
            window.ended(PROMPT, PROMPT // 2 + k % PROMPT, ANSWER)
    return window


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return 1e3 * best


if __name__ == "__main__":
    sys.exit(main())
