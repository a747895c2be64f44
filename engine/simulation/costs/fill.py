"""Costs of programs that were not measured, from those of other sizes that were.

A log or a profile has the programs that ran; another topology, or a longer queue, runs others. What a program costs
whatever fills it lies on lines through the measured sizes; what depends on what is in it is as for the nearest size. A
fused step costs what a prompt step of as many tokens as it has tokens and rows costs, and its rows' own. All of it is a
guess, better between sizes than beyond them; what was measured stays as it is.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import msgspec

from ...config import EngineConfig
from ...scheduler.cost_model import CostModel, ProgramCost


def filled(costs: CostModel, config: EngineConfig) -> CostModel:
    """Return the costs with every program that an engine of this configuration runs.

    Raises:
        ValueError: no steps of a kind that it needs were measured.
    """
    prefill = _filled("prefill", costs.prefill, config.prefill_buckets)
    decode = _filled("decode", costs.decode, config.decode_buckets)
    fused = dict(costs.fused)
    if any(spec.fused for spec in config.topology.meshes):
        rows = config.decode_buckets[-1]
        for bucket in config.prefill_buckets:
            if bucket not in fused:
                fused[bucket] = _fused(prefill, decode[rows], bucket, rows)
    return msgspec.structs.replace(costs, prefill=prefill, decode=decode, fused=fused)


def _filled(kind: str, known: Mapping[int, ProgramCost], buckets: Sequence[int]) -> dict[int, ProgramCost]:
    if not known:
        raise ValueError(f"no {kind} steps were measured: there is nothing to fit their costs to.")
    return dict(known) | {bucket: _of_size(known, bucket) for bucket in buckets if bucket not in known}


def _of_size(known: Mapping[int, ProgramCost], size: int) -> ProgramCost:
    """Return the costs of a size between or beyond the known ones."""
    nearest = min(known, key=lambda other: abs(other - size))
    return msgspec.structs.replace(known[nearest], fixed=_on_lines({s: p.fixed for s, p in known.items()}, size))


def _on_lines(known: Mapping[int, float], size: int) -> float:
    """Return a value on lines through those of known sizes. Below the smallest it is that one's, since a step has a
    least time; above the largest it grows as between the last two, or with the size where there is one only."""
    sizes = sorted(known)
    if size <= sizes[0]:
        return known[sizes[0]]
    if len(sizes) == 1:
        return known[sizes[0]] * size / sizes[0]
    index = min(bisect_left(sizes, size), len(sizes) - 1)
    below, above = sizes[index - 1], sizes[index]
    slope = max(0.0, (known[above] - known[below]) / (above - below))
    return known[above] + slope * (size - above)


def _fused(prefill: Mapping[int, ProgramCost], decode: ProgramCost, bucket: int, rows: int) -> ProgramCost:
    own = prefill[bucket]
    fixed = _on_lines({size: program.fixed for size, program in prefill.items()}, bucket + rows)
    return msgspec.structs.replace(own, fixed=fixed, row=decode.row, context=decode.context)
