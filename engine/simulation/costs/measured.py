"""What was measured: steps with what was in them, transfers, and how long other meshes computed meanwhile."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from ...protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill
from ...scheduler.cost_model import pairs

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
    # Whether its mesh had work when it was dispatched; if not, the seconds include what the host takes to start and to
    # read a step.
    is_queued: bool = True
    gathered: int = 0  # bytes of transfers that its mesh gathered before it, in the same time
    scattered: int = 0  # and scattered


class MeasuredTransfer(NamedTuple):
    """A transfer that had its link for itself."""

    size: int  # bytes
    seconds: float


class Entered(NamedTuple):
    """A request that came in."""

    prompt_len: float  # of several that came in together, their mean
    seconds: float  # from its call, or from when the one before it was in, until the dispatching thread had it


class HostWork(NamedTuple):
    """What the dispatching thread did in some time."""

    seconds: float  # of its CPU time
    steps: int  # that it dispatched
    rows: int  # rows and chunks of those
    requests: int  # that came in


def measured_step(
    action: Prefill | Decode | Fused, seconds: float, beside: Iterable[Beside] = (), *, is_queued: bool = True
) -> MeasuredStep:
    """Return what a step that took so long says about costs."""
    chunks: Sequence[Chunk] = () if isinstance(action, Decode) else action.chunks
    rows: Sequence[DecodeRow] = () if isinstance(action, Prefill) else action.rows
    passes = action.steps if isinstance(action, Decode) else 1
    return MeasuredStep(
        mesh=action.mesh,
        kind=kind_of(action),
        bucket=action.bucket,
        passes=passes,
        chunks=len(chunks),
        pairs=sum([pairs(chunk.start, chunk.length) for chunk in chunks]),
        rows=passes * len(rows),
        context=passes * sum([row.kv_len for row in rows]) + len(rows) * (passes * (passes - 1) // 2),
        seconds=seconds,
        beside=tuple(beside),
        is_queued=is_queued,
    )


def kind_of(action: Prefill | Decode | Fused) -> Kind:
    """Return the kind of a step."""
    if isinstance(action, Decode):
        return "decode"
    return "prefill" if isinstance(action, Prefill) else "fused"


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
