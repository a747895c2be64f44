"""What one mesh is, holds and has done, at some time. Plain data; `core/mesh_work.py` reads it from an engine."""

from dataclasses import dataclass
from typing import Literal

StepKind = Literal["prefill", "decode", "fused"]
PageState = Literal["used", "cached", "free"]


@dataclass(frozen=True)
class MeshFigures:
    """One mesh; counts are since start-up."""

    role: str  # now
    draining: str | None  # the phase of which it has work left that its role has no more
    devices: int
    requests: int  # that have a place there, or one that waits for their KV
    # Of each cache group: "used" by requests, "cached" for prompts to come and given away when they are needed, "free".
    pages: tuple[dict[PageState, int], ...]
    steps: dict[StepKind, int]  # dispatched
    busy: float  # seconds in which it has computed
