"""What each mesh of a running engine has done, and what it is and holds now.

`performed` and `received` cost the dispatching thread a few dictionary look-ups a step. `figures` may be called from
any thread: counts that change meanwhile may belong to instants that lie apart, by a turn of that thread at most.
"""

from collections.abc import Callable

from ..metrics.mesh_figures import MeshFigures, PageState, StepKind
from ..paging.allocator import PageAllocator
from ..protocol.actions import Action, Decode, Fused, Prefill
from ..scheduler.mesh_state import MeshState
from ..scheduler.scheduler import Scheduler
from .busy_time import STEPS, BusyTime

_KINDS: dict[type[Action], StepKind] = {Prefill: "prefill", Decode: "decode", Fused: "fused"}


class MeshWork(BusyTime):
    """Steps and busy seconds by mesh, since this began to observe."""

    def __init__(self, meshes: int, clock: Callable[[], float]) -> None:
        """Begin with none; `clock` is the engine's."""
        super().__init__(meshes, clock)
        self._steps: list[dict[StepKind, int]] = [dict.fromkeys(_KINDS.values(), 0) for _ in range(meshes)]

    def performed(self, action: Action) -> None:
        """Count a step that was dispatched."""
        super().performed(action)
        if isinstance(action, STEPS):
            self._steps[action.mesh][_KINDS[type(action)]] += 1

    def figures(self, scheduler: Scheduler) -> tuple[MeshFigures, ...]:
        """Return the figures of each mesh now."""
        return tuple(
            _figures(mesh, steps.copy(), seconds)
            for mesh, steps, seconds in zip(scheduler.meshes, self._steps, self.seconds, strict=True)
        )


def _figures(mesh: MeshState, steps: dict[StepKind, int], seconds: float) -> MeshFigures:
    return MeshFigures(
        role=mesh.role.value,
        draining=mesh.draining,
        devices=mesh.spec.tp,
        requests=len(mesh.placed),
        pages=tuple(_pages(group) for group in mesh.pages.groups),
        steps=steps,
        busy=seconds,
    )


def _pages(group: PageAllocator) -> dict[PageState, int]:
    idle, free = group.num_idle, group.num_free
    return {"used": group.num_pages - free, "cached": idle, "free": max(0, free - idle)}
