"""The driver's executor: its meshes are other processes', whom it sends the commands of a turn in one message each.

A command goes to the worker of its mesh, in order. What is known of a request (`Accept`) is kept here, and goes to a
worker before the first step there that needs it. Completions come back on the threads of the crew's backend, and go on
to the core with their times on the driver's clock: as old as they were when they were sent.

Invariants: a mesh takes commands from its `ResetMesh` on, which the core performs when the mesh joins, until its worker
is lost; what is performed for it in between is dropped, so that nothing decided before a loss reaches what comes after
it. Every transfer to another worker ends once for the scheduler, whoever of the two is lost: what a lost source had
under way ends with its `MeshLost`, all else here. `transfers.py` keeps them. For the dispatching thread,
but for what comes from the crew.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from ...errors import EngineError
from ...protocol.actions import Accept, Command, DropTransfer, Finish, ResetMesh, Scatter, StartTransfer
from ...protocol.events import MeshJoined, TransferFailed, TransferReady
from ...protocol.results import Completion, MeshLost, Traffic
from ...protocol.worker import FromWorker, NewParams, Offered, Posted, Turn
from .commands import mesh_of
from .crew import Crew
from .crew_member import Stage
from .transfers import Transfers
from .worker_loop import as_message

_STEPS = ("chunks", "rows")


class RemoteExecutor:
    """The meshes of a crew; an `Executor` (`protocol/executor.py`)."""

    def __init__(
        self,
        crew: Crew,
        post: Callable[[Completion], None],
        clock: Callable[[], float],
        check: Callable[[Mapping[str, Any]], None],
        why_over: Callable[[set[int]], str | None],
    ) -> None:
        """Take over a crew that serves.

        Args:
            crew: closed with this.
            post: takes completions from any thread.
            clock: gives seconds.
            check: refuses parameters that cannot stand in for the present ones.
            why_over: says why an engine without these meshes cannot go on; None: it can.
        """
        self.crew, self._post, self._clock = crew, post, clock
        self._check, self._why_over = check, why_over
        self._lock = threading.RLock()
        self._worker_of = {mesh: index for index, place in enumerate(crew.places) for mesh in place.meshes}
        count = len(crew.places)
        self._turns: list[list[Command]] = [[] for _ in range(count)]
        self._known: list[set[int]] = [set() for _ in range(count)]  # requests of which a worker has the last `Accept`
        self.records: dict[int, Accept] = {}
        self.traffic = Traffic()
        self._closed_meshes: set[int] = set()
        self._given_up: set[int] = set()
        self._params: dict[str, np.ndarray] = {}  # that were replaced since the files were loaded
        self._over: str | None = None  # why the engine cannot go on
        self._epochs = crew.epochs()
        self._transfers = Transfers(crew, self._worker_of, self._epochs)
        crew.serve(self)

    # ---- the dispatching thread

    @property
    def num_staged(self) -> int:
        """Return the number of transfers that are on their way or wait for their scatter."""
        with self._lock:
            return len(self._transfers)

    def perform(self, command: Command) -> None:
        """Keep one command for the end of the turn.

        Raises:
            EngineError: a worker is gone for good without which the engine cannot go on.
        """
        with self._lock:
            if self._over is not None:
                raise EngineError(self._over)
            match command:
                case Accept(request_id=id_):
                    self.records[id_] = command
                    for known in self._known:
                        known.discard(id_)
                case Finish(request_id=id_):
                    self.records.pop(id_, None)
                    for worker, known in enumerate(self._known):
                        if id_ in known:
                            known.remove(id_)
                            self._turns[worker].append(command)
                case DropTransfer(transfer=number):
                    told = self._transfers.drop(number)
                    if told is not None:
                        self._turns[told].append(command)
                case _:
                    self._perform_on_mesh(command)

    def flush(self) -> None:
        """Send what was performed since the last call, a message to each worker."""
        with self._lock:
            for worker, commands in enumerate(self._turns):
                if commands:
                    self._turns[worker] = []
                    self.crew.send(worker, Turn(self._epochs[worker], tuple(commands)))

    def check_params(self, new: Mapping[str, Any]) -> None:
        """Refuse parameters that cannot stand in for those of the same names, or cannot be sent."""
        self._check(new)

    def replace_params(self, new: Mapping[str, Any]) -> None:
        """Send new parameters to every worker, in order with the commands; those that join later get them too."""
        arrays = {path: np.array(array) for path, array in new.items()}  # copies: the caller may write to its own
        self.flush()
        with self._lock:
            self._params |= arrays
            for worker, epoch in enumerate(self._epochs):
                self._send_params(worker, epoch, arrays)

    def close(self) -> None:
        """End the workers and let go of all that is kept of requests."""
        self.crew.close()
        self.records.clear()

    def _perform_on_mesh(self, command: Command) -> None:
        mesh = mesh_of(command)
        assert mesh is not None
        worker = self._worker_of[mesh]
        if isinstance(command, ResetMesh) and self.crew.stage(worker) is Stage.SERVING:
            self._closed_meshes.discard(mesh)
        if mesh in self._closed_meshes:
            if isinstance(command, Scatter):
                self._transfers.scattered(command.transfer)
            return
        turn = self._turns[worker]
        if isinstance(command, StartTransfer):
            self._transfers.begin(command, self._clock())
        elif isinstance(command, Scatter):
            self._transfers.scattered(command.transfer)
        else:
            self._introduce(command, worker, turn)
        turn.append(command)

    def _introduce(self, command: Command, worker: int, turn: list[Command]) -> None:
        """Before a step, send what its worker does not know of the requests in it."""
        known = self._known[worker]
        for rows in (getattr(command, name, ()) for name in _STEPS):
            for row in rows:
                if row.request_id not in known:
                    known.add(row.request_id)
                    turn.append(self.records[row.request_id])

    def _send_params(self, worker: int, epoch: int, arrays: Mapping[str, np.ndarray]) -> None:
        for path, array in arrays.items():  # a message each: one for all would have to be made as a whole
            self.crew.send(worker, NewParams(epoch, {path: as_message(array)}))

    # ---- threads of the crew

    def heard(self, worker: int, message: FromWorker) -> None:
        """Take in what a worker has sent."""
        match message:
            case Posted():
                self._posted(worker, message)
            case Offered(transfer=number, offer=offer):
                with self._lock:
                    failed = self._transfers.offered(worker, number, offer)
                if failed is not None:
                    self._post(TransferFailed(self._clock(), number, failed))

    def lost(self, worker: int, why: str) -> None:
        """Take in that a worker is gone, with all that it had and all that was on its way to it."""
        meshes, t = self.crew.places[worker].meshes, self._clock()
        name = self.crew.backend.name(worker)
        with self._lock:
            self._closed_meshes |= set(meshes)
            self._turns[worker].clear()
            self._known[worker].clear()
            in_vain = self._transfers.lost(worker)
        for mesh in meshes:
            self._post(MeshLost(t, mesh, f"{name} of mesh {mesh} was lost: {why}", is_gone=True))
        for number in in_vain:  # after the loss: its requests need them no more
            self._post(TransferFailed(t, number, why))

    def joined(self, worker: int, epoch: int) -> None:
        """Take in that a worker serves again."""
        with self._lock:
            self._epochs[worker] = epoch
            self._send_params(worker, epoch, self._params)
        for mesh in self.crew.places[worker].meshes:
            self._post(MeshJoined(self._clock(), mesh))

    def given_up(self, worker: int, why: str) -> None:
        """Take in that a worker will not come back; the engine ends if nobody can do what it did."""
        meshes = self.crew.places[worker].meshes
        with self._lock:
            self._given_up |= set(meshes)
            over = self._why_over(self._given_up)
            if over is not None:
                name = self.crew.backend.name(worker)
                self._over = f"{over} since {name} could not be started again: {why}"
        for mesh in meshes:
            self._post(MeshLost(self._clock(), mesh, why, is_gone=True))

    def _posted(self, worker: int, message: Posted) -> None:
        now, meshes = self._clock(), self.crew.places[worker].meshes
        with self._lock:
            for moved in message.moved:
                self.traffic.count(moved.source, moved.destination, moved.size, moved.seconds)
        for completion in message.completions:
            t = min(now, now - (message.sent - completion.t))
            if isinstance(completion, TransferReady | TransferFailed):
                self._transfer_ended(replace(completion, t=t))
            elif completion.mesh not in meshes:
                self.crew.give_up_on(worker, message.epoch, f"it spoke for mesh {completion.mesh}.")
            else:
                self._post(replace(completion, t=t))

    def _transfer_ended(self, completion: TransferReady | TransferFailed) -> None:
        with self._lock:
            ended = self._transfers.ended(completion.transfer, has_arrived=isinstance(completion, TransferReady))
            if ended is None:
                return
            if ended.offer is not None and isinstance(completion, TransferReady):
                seconds = max(0.0, completion.t - ended.begun)
                self.traffic.count(ended.source, ended.destination, ended.offer.nbytes, seconds)
        self._post(completion)
