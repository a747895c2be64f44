"""How long each mesh of a running engine has computed: from when a step could begin to when its result was there.

As the decision log's stamps have it (`stamper.py`): a mesh can begin a step once it has it and has done the one before.
"""

from collections.abc import Callable

from ..protocol.actions import Action, Decode, Fused, Prefill
from ..protocol.events import MeshFailed
from ..protocol.results import MeshLost, StepFailed, StepResult
from .inspection import Observer

STEPS = (Prefill, Decode, Fused)  # made once: they are asked for with every action


class BusyTime(Observer):
    """Seconds by mesh, since this began to observe."""

    def __init__(self, meshes: int, clock: Callable[[], float]) -> None:
        """Begin with none; `clock` is the engine's."""
        self._clock = clock
        self._dispatched: list[dict[int, float]] = [{} for _ in range(meshes)]  # when, by step
        self._done = [0.0] * meshes  # when the last step to come back was done
        self.seconds = [0.0] * meshes

    def performed(self, action: Action) -> None:
        """Note when a step was dispatched."""
        if isinstance(action, STEPS):
            self._dispatched[action.mesh][action.step] = self._clock()

    def received(self, message: object) -> None:
        """Count a step that has come back."""
        match message:
            case StepResult(t=t, mesh=mesh, step=step):
                begun = self._dispatched[mesh].pop(step, None)
                if begun is not None:  # else it was dispatched before this began, or its mesh was lost meanwhile
                    self.seconds[mesh] += max(0.0, t - max(begun, self._done[mesh]))
                self._done[mesh] = max(self._done[mesh], t)
            case StepFailed(mesh=mesh) | MeshLost(mesh=mesh) | MeshFailed(mesh=mesh):
                self._dispatched[mesh].clear()
