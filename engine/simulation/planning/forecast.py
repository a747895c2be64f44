"""What the planner's fluid model says of an engine before anything is simulated: a few milliseconds for all splits.

Used to leave out what cannot be best, and for the roles that a pool begins with. `scheduler/prediction.py` predicts;
here its observations are made of a workload, or of a mix of lengths, and of a cost model in place of measured steps.
"""

from collections.abc import Callable, Sequence
from itertools import islice, pairwise

from ...config import EngineConfig, PoolSize, bucket_for
from ...protocol.service import SLO
from ...scheduler.cost_model import CostModel, ProgramCost, pairs
from ...scheduler.line_fit import Terms
from ...scheduler.observations import Demand, MeshSize, Observations, Outlook, Pair, Queues, Split, StepTimes
from ...scheduler.prediction import predict
from ..simulator import SimulatedEngine
from ..workload import Workload, WorkRequest

_MOST = 20_000  # requests of a workload that are looked at
_BINS, _BIN_SECONDS = 512, 0.5  # of the time that is looked at, from the start
_PAIRS = 512


def forecast_splits(demand: Demand, engine: SimulatedEngine, slo: SLO, splits: Sequence[Split]) -> list[Outlook]:
    """Predict what becomes of a demand under splits of meshes that are all alike."""
    config, pool, costs = engine.config, engine.pools[0], engine.costs_of_meshes[0]
    is_fused, tokens = config.topology.meshes[0].fused, config.kv_tokens(pool.pages)
    size = MeshSize(config.chunk_size, config.prefill_rows, config.max_num_seqs, tokens, is_fused)
    nothing = Queues(0.0, 0.0, 0, 0.0, 0)
    observed = Observations(splits[0], demand, nothing, step_times(costs, config, pool, demand.pairs), size)
    return predict(observed, slo, splits)


def demand_of(workload: Workload) -> Demand | None:
    """Return the first minutes of a workload; None: too few of its requests come at times of their own."""
    requests = [r for r in islice(workload.requests, _MOST) if r.at is not None and r.at < _BINS * _BIN_SECONDS]
    if len(requests) < 2:
        return None
    bins = int(_last(requests) / _BIN_SECONDS) + 1
    counts, tokens = [0] * bins, [0.0] * bins
    for request in requests:
        at = int((request.at or 0.0) / _BIN_SECONDS)
        counts[at] += 1
        tokens[at] += request.prompt_len
    sample = requests[:: max(1, len(requests) // _PAIRS)]
    lengths = [Pair(r.prompt_len, r.prompt_len, r.output_len) for r in sample]
    return Demand(_BIN_SECONDS, counts, tokens, lengths, sum(counts))


def steady(rate: float, lengths: Sequence[Pair]) -> Demand:
    """Return a demand of so many requests a second, evenly, with these lengths."""
    prompt = sum(pair.to_compute for pair in lengths) / len(lengths)
    bins = 128
    so_far = [round(rate * _BIN_SECONDS * k) for k in range(bins + 1)]
    counts = [after - before for before, after in pairwise(so_far)]
    return Demand(_BIN_SECONDS, counts, [count * prompt for count in counts], lengths, sum(counts))


def step_times(costs: CostModel, config: EngineConfig, pool: PoolSize, lengths: Sequence[Pair]) -> StepTimes:
    """Return lines through what the smallest and the largest step of each kind cost with requests of these lengths."""
    prompt = sum(pair.prompt for pair in lengths) / len(lengths)
    context = prompt + sum(pair.output for pair in lengths) / len(lengths) / 2

    def prefill(tokens: int) -> float:
        start = max(0, round((prompt - tokens) / 2))  # of a long prompt's chunks, the one in the middle
        program = costs.prefill[bucket_for(tokens, config.prefill_buckets)]
        chunks = max(1, round(tokens / max(1.0, prompt)))
        return program.fixed + program.chunk * chunks + program.pair * chunks * pairs(start, tokens // chunks)

    def decode(rows: int) -> float:
        program: ProgramCost = costs.decode[bucket_for(rows, config.decode_buckets)]
        return program.fixed + rows * (program.row + program.context * context)

    pages = config.pages_for(round(prompt))
    handoff = costs.transfer(pages * sum(pool.sent_pages) + pool.state_bytes)
    return StepTimes(
        _line(prefill, config.prefill_buckets[0], config.chunk_size), _line(decode, 1, config.max_num_seqs),
        handoff, is_measured=True,
    )  # fmt: skip


def _line(seconds: Callable[[int], float], small: int, large: int) -> Terms:
    """Return the line through two sizes; neither part is negative."""
    low, high = seconds(small), seconds(large)
    each = max(0.0, (high - low) / (large - small)) if large > small else 0.0
    return Terms(max(0.0, high - each * large), each)


def _last(requests: Sequence[WorkRequest]) -> float:
    return max(request.at or 0.0 for request in requests)
