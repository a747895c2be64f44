"""What a worker does once it serves: it performs what its driver sends, in order, until the driver is gone.

Invariants: one thread performs, as in one process; a command that raises costs its mesh or its transfer, and what
follows for a mesh that is lost is left out until the driver has it reset, since it may rest on what was lost. Relies on
`WorkerExecutor`; decides nothing.
"""

from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

from ...errors import EngineError
from ...host.threads import EngineThread
from ...protocol import wire
from ...protocol.actions import Command, DropTransfer, ResetMesh, Scatter, StartTransfer
from ...protocol.events import TransferFailed
from ...protocol.results import MeshLost, describe
from ...protocol.worker import (
    Fetch,
    HostArray,
    MasksPrepared,
    NewParams,
    PrepareMasks,
    Refused,
    ToWorker,
    Turn,
    Withdraw,
)
from ..jax_settings import own_settings
from .commands import mesh_of
from .outbox import Outbox
from .worker_executor import WorkerExecutor

type Work = ToWorker | wire.WireError | Callable[[], None] | None


class WorkerLoop:
    """The performing thread of one worker."""

    def __init__(
        self,
        epoch: int,
        inbox: "SimpleQueue[Work]",
        outbox: Outbox,
        executor: WorkerExecutor,
        clock: Callable[[], float],
        prepare_masks: Callable[[], None],
    ) -> None:
        """Perform nothing yet; None in the `inbox` ends it. `prepare_masks` compiles what those need, on any thread."""
        self._epoch, self._inbox, self._outbox = epoch, inbox, outbox
        self._prepare_masks = prepare_masks
        self._executor, self._clock = executor, clock
        self._lost: set[int] = set()  # meshes that the driver has not reset yet

    def run(self) -> None:
        """Perform until the driver is gone, or the engine cannot go on here."""
        while (work := self._inbox.get()) is not None:
            try:
                self._do(work)
            except EngineError as error:
                self._outbox.say(Refused(self._epoch, str(error)))
                return
            except Exception as error:  # no mesh had a part in it: a bug
                self._outbox.say(Refused(self._epoch, f"it failed: {describe(error)}."))
                return

    def _do(self, work: ToWorker | wire.WireError | Callable[[], None]) -> None:
        match work:
            case Turn(epoch=epoch, commands=commands) if epoch == self._epoch:
                for command in commands:
                    self._perform(command)
            case Fetch(epoch=epoch) if epoch == self._epoch:
                self._fetch(work)
            case Withdraw(epoch=epoch, transfer=transfer, was_fetched=was_fetched) if epoch == self._epoch:
                self._executor.let_go(transfer, was_fetched=was_fetched)
            case NewParams(epoch=epoch, params=params) if epoch == self._epoch:
                self._executor.replace_params({path: as_array(array) for path, array in params.items()})
            case PrepareMasks(epoch=epoch) if epoch == self._epoch:
                EngineThread(target=self._prepare, name="twinmesh-compile-masks", daemon=True).start()
            case wire.WireError():  # nobody knows what was to be done, for transfers of others too
                raise EngineError(f"it could not read what it was sent: {work}")
            case _ if callable(work):
                work()

    def _perform(self, command: Command) -> None:
        mesh = mesh_of(command)
        if isinstance(command, ResetMesh):
            self._lost.discard(command.mesh)
        elif mesh in self._lost:
            if isinstance(command, Scatter):
                self._executor.perform(DropTransfer(command.transfer))
            elif isinstance(command, StartTransfer):
                self._outbox.post(TransferFailed(self._clock(), command.transfer, "its mesh was lost."))
            return
        try:
            self._executor.perform(command)
        except EngineError:
            raise
        except Exception as error:
            self._failed(command, mesh, describe(error))

    def _failed(self, command: Command, mesh: int | None, why: str) -> None:
        if isinstance(command, StartTransfer):
            self._outbox.post(TransferFailed(self._clock(), command.transfer, why))
        elif isinstance(command, ResetMesh):  # to be asked for it again and again would be no way out
            raise EngineError(f"it could not make the KV pool of mesh {mesh} anew: {why}.")
        elif mesh is not None:
            self._lost.add(mesh)
            self._outbox.post(MeshLost(self._clock(), mesh, why))
        else:
            raise RuntimeError(why)

    def _prepare(self) -> None:
        """Compile what masks need, beside the steps, and say so."""
        why = None
        try:
            with own_settings():
                self._prepare_masks()
        except Exception as error:
            why = describe(error)
        self._outbox.say(MasksPrepared(self._epoch, why))

    def _fetch(self, message: Fetch) -> None:
        try:
            self._executor.fetch(message)
        except Exception as error:
            self._outbox.post(TransferFailed(self._clock(), message.transfer, describe(error)))


def as_array(array: HostArray) -> np.ndarray:
    """Make a host array of one that came in a message."""
    return np.frombuffer(array.data, np.dtype(array.dtype)).reshape(array.shape)


def as_message(array: np.ndarray) -> HostArray:
    """Make what goes into a message of a host array of any dtype."""
    return HostArray(array.dtype.name, array.shape, array.tobytes())
