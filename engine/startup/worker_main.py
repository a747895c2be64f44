"""What runs in a worker, whatever started it: it checks, loads, and serves until its driver is gone.

    serve(driver)               # a `DriverEnd` of any backend
    python -c "... main(fd)"    # of `worker/remote/processes.py`

The thread that reads starts before JAX is imported, and says that it is alive while everything else happens.
Invariant: the process does not outlive its driver: where it cannot end in order within seconds, it ends at once.
"""

import os
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ..host.threads import EngineThread
from ..protocol import wire
from ..protocol.worker import (
    UNTOLD,
    Alive,
    Beat,
    Checked,
    DriverEnd,
    Load,
    Member,
    NewParams,
    Prepare,
    Refused,
    Serving,
)

if TYPE_CHECKING:
    from .worker_part import Loaded, WorkerPart

_JOIN_SECONDS = 120.0  # until all processes of a mesh have started
_END_SECONDS = 5.0  # to end in order once the driver is gone


def main(descriptor: int) -> None:
    """Serve the driver at the other end of an inherited socket; the process ends with it."""
    from ..worker.remote.processes import DriverConnection

    os.dup2(2, 1)  # what libraries print is no part of the driver's output
    serve(DriverConnection(descriptor))
    os._exit(0)  # threads that wait for a device or a fetch must not keep it


def serve(driver: DriverEnd) -> None:
    """Do a worker's part until the driver is gone, or the worker refuses to go on, which it has said by then.

    It ends the process where that takes too long.
    """
    _Worker(driver).run()


class _Worker:
    """One worker, from its first message to its end."""

    def __init__(self, driver: DriverEnd) -> None:
        self._driver, self._inbox = driver, SimpleQueue[Any]()
        self._lock = threading.Lock()
        self._epoch = UNTOLD
        self._loaded: Loaded | None = None
        self._reader = EngineThread(target=self._read, name="twinmesh-worker-reader", daemon=True)

    def run(self) -> None:
        """Serve."""
        self._reader.start()
        try:
            self._serve()
        except ValueError as error:
            self._send(Refused(self._epoch, str(error)))
        except Exception as error:
            from ..protocol.results import describe

            self._send(Refused(self._epoch, f"it failed to start: {describe(error)}."))

    def _send(self, message: Any) -> None:
        data = wire.encode(message)
        with self._lock:
            self._driver.send(data)

    def _send_bytes(self, data: bytes) -> None:
        with self._lock:
            self._driver.send(data)

    def _read(self) -> None:
        """Read what the driver sends; beats are answered here."""
        while (data := self._driver.receive()) is not None:
            try:
                message = wire.decode_to_worker(data)
            except wire.WireError as error:
                self._inbox.put(error)
                continue
            if isinstance(message, Beat | NewParams):  # many parameters may keep the beats behind them for long
                counter = None if self._loaded is None else self._loaded.compilations
                number = message.number if isinstance(message, Beat) else 0
                self._send(Alive(message.epoch, number, 0 if counter is None else counter.count))
            if not isinstance(message, Beat):
                self._inbox.put(message)
        self._inbox.put(None)
        threading.Timer(_END_SECONDS, os._exit, (1,)).start()

    def _serve(self) -> None:
        first = self._inbox.get()
        if first is None:
            return
        if isinstance(first, wire.WireError):
            raise ValueError(f"it could not read what it was sent: {first}")
        if not isinstance(first, Prepare):
            raise ValueError(f"it was sent {type(first).__name__} before anything else.")
        self._epoch = first.epoch
        from ..sharding.spanning import join
        from ..worker.jax_settings import own_settings
        from .worker_part import WorkerPart, to_bytes

        if first.member is not None:
            join(first.member, _JOIN_SECONDS)
        part = WorkerPart(first.asked, first.place, first.member)
        found = part.check()
        self._send(Checked(self._epoch, to_bytes(found)))
        load = self._inbox.get()
        if not isinstance(load, Load):
            return  # the driver is gone, or has ended the start
        with own_settings():
            self._run(part, load, first.member)

    def _run(self, part: "WorkerPart", load: Load, member: Member | None) -> None:
        """Load, and perform what comes."""
        from ..worker.links.choice import open_links
        from ..worker.remote.outbox import MemberOutbox, Outbox
        from ..worker.remote.worker_executor import WorkerExecutor
        from ..worker.remote.worker_loop import WorkerLoop

        loaded = self._loaded = part.load(load.agreed)
        links = open_links(part.place.on_machine, self._driver.host)
        to_driver = self._epoch, self._send_bytes, time.monotonic
        outbox = Outbox(*to_driver) if member is None else MemberOutbox(*to_driver, member)
        executor = WorkerExecutor(
            loaded.meshes, outbox.post, time.monotonic, loaded.maps, links, outbox.offered, self._inbox.put, member
        )
        executor.traffic = outbox
        self._send(Serving(self._epoch))
        try:
            prepare = loaded.compilations.prepare_masks
            WorkerLoop(self._epoch, self._inbox, outbox, executor, time.monotonic, prepare).run()
        finally:
            executor.close()
            loaded.compilations.close()
