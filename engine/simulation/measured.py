"""What was measured: steps with what was in them, transfers, and how long other meshes computed meanwhile."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from ..protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill
from ..scheduler.cost_model import pairs

Kind = Literal["prefill", "decode", "fused"]


class Beside(NamedTuple):
    """A part of a step's time in which other meshes computed."""

    seconds: float
    prefills: int  # meshes with a step that holds prompt chunks
    decodes: int  # meshes with a step of decode rows alone


class MeasuredStep(msgspec.Struct, frozen=True):
    """A step that was run; counts are of all its passes together."""

    mesh: int
    kind: Kind
    bucket: int
    passes: int  # runs of its program: `Decode.steps`, else 1
    chunks: int
    pairs: int  # of query and key tokens of its chunks
    rows: int  # rows that decoded
    context: int  # KV tokens that they read
    seconds: float
    beside: tuple[Beside, ...] = ()  # the rest of the time no other mesh computed


class MeasuredTransfer(NamedTuple):
    """A transfer that had its link for itself."""

    size: int  # bytes
    seconds: float


def measured_step(action: Prefill | Decode | Fused, seconds: float, beside: Iterable[Beside] = ()) -> MeasuredStep:
    """Return what a step that took so long says about costs."""
    if isinstance(action, Decode):
        return _measured(action, "decode", action.steps, (), action.rows, seconds, beside)
    if isinstance(action, Prefill):
        return _measured(action, "prefill", 1, action.chunks, (), seconds, beside)
    return _measured(action, "fused", 1, action.chunks, action.rows, seconds, beside)


def _measured(
    action: Prefill | Decode | Fused,
    kind: Kind,
    passes: int,
    chunks: Sequence[Chunk],
    rows: Sequence[DecodeRow],
    seconds: float,
    beside: Iterable[Beside],
) -> MeasuredStep:
    read = passes * sum([row.kv_len for row in rows]) + len(rows) * (passes * (passes - 1) // 2)
    attended = sum([pairs(chunk.start, chunk.length) for chunk in chunks])
    return MeasuredStep(
        action.mesh, kind, action.bucket, passes, len(chunks), attended, passes * len(rows), read, seconds,
        tuple(beside),
    )  # fmt: skip


def without_cold(steps: Iterable[MeasuredStep]) -> list[MeasuredStep]:
    """Leave out the first run of each program on each mesh, in the order in which they ran: no cache has its code and
    data then."""
    seen, kept = set[tuple[int, Kind, int]](), list[MeasuredStep]()
    for step in steps:
        program = step.mesh, step.kind, step.bucket
        if program in seen:
            kept.append(step)
        seen.add(program)
    return kept
