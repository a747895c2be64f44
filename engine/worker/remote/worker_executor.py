"""The executor of one worker: its meshes under the topology's numbers, and KV that comes from or goes to others.

A transfer within the worker is the local executor's. One to another worker is gathered here, offered through a link on
the waiter's thread of its source, and held until it is withdrawn; one from another worker is fetched on a thread of its
source's, and staged by the thread that performs, as all else. Invariant: every transfer that was begun or fetched here
is answered once, by an offer, `TransferReady` or `TransferFailed`, also where nobody needs it any more.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

from ....models.checkpoints.host_memory import FileMaps
from ...host.threads import EngineThread
from ...protocol.actions import Command, DropTransfer, StartTransfer
from ...protocol.events import TransferFailed, TransferReady
from ...protocol.offers import KVOffer
from ...protocol.results import Completion, describe
from ...protocol.worker import Fetch, Member
from ..jax_settings import own_settings
from ..kv_transfer import Route, Staging, abstract_staging, plan, staged_pages
from ..links.choice import Links
from ..links.link import Link, LinkError
from ..links.parcels import ALONE, fetch_parts, for_member, offer_of_member, offer_staging
from ..local_executor import LocalExecutor, Staged
from ..mesh_worker import MeshWorker

FETCH_SECONDS = 30.0  # after which a fetch is given up


@dataclass(eq=False)
class _Fetching:
    """A transfer from another worker that has not been staged."""

    message: Fetch
    is_dropped: bool = False


class WorkerExecutor(LocalExecutor):
    """The meshes of one worker."""

    def __init__(
        self,
        meshes: Mapping[int, MeshWorker],
        post: Callable[[Completion], None],
        clock: Callable[[], float],
        maps: FileMaps | None,
        links: Links,
        offered: Callable[[int, KVOffer], None],
        later: Callable[[Callable[[], None]], None],
        member: Member | None = None,
    ) -> None:
        """Start the waiter threads.

        Args:
            meshes: by their number in the topology.
            post: takes completions from any thread.
            clock: gives their times in seconds.
            maps: the files that weights lie in, if any do.
            links: to and from other workers; closed with this.
            offered: takes a transfer and its offer, from any thread.
            later: has something done by the thread that performs.
            member: which process of those that have the mesh between them this is; None: it has its meshes alone.
        """
        super().__init__(list(meshes.values()), post, clock, maps, list(meshes))
        self._links = links
        self._offered, self._later, self._member = offered, later, member
        self._lock = threading.Lock()  # for the uuids, which waiters add
        self._held: dict[int, tuple[Link, list[int]]] = {}  # transfer -> the offers that are held for it, by uuid
        self._fetching: dict[int, _Fetching] = {}
        self._fetchers: dict[int, _Fetcher] = {}  # by source mesh

    def perform(self, command: Command) -> None:
        """Dispatch one command without waiting for the device."""
        if isinstance(command, DropTransfer) and command.transfer in self._fetching:
            self._fetching[command.transfer].is_dropped = True
            return
        super().perform(command)

    def fetch(self, message: Fetch) -> None:
        """Begin to fetch what another worker offers."""
        fetching = _Fetching(message)
        here = self._mesh(message.destination).plan
        tp, pages = self._tp_of(message.source), staged_pages(here.config, message.bucket)
        route = plan(here.model.num_kv_heads, tp, here.mesh.size)
        expected = abstract_staging(here.state, here.mesh, route, pages)
        links = self._links

        def fetch() -> None:
            staging, why = None, ""
            try:
                if fetching.is_dropped:  # so that what follows a source that was lost does not wait for it
                    raise LinkError("nobody needs it any more.")
                link, offer, member = links.of(message.offer.link), message.offer, self._member
                parts = [(ALONE, offer)] if member is None else for_member(offer, route, member)
                staging = fetch_parts(link, parts, expected, here.mesh, route, FETCH_SECONDS)
            except Exception as error:
                why = describe(error)
            t = self._clock()
            self._later(lambda: self._fetched(fetching, staging, why, t))

        if message.source not in self._fetchers:
            self._fetchers[message.source] = _Fetcher(f"twinmesh-fetch-{message.source}")
        self._fetching[message.transfer] = fetching
        self._fetchers[message.source].do(fetch)

    def let_go(self, transfer: int, *, was_fetched: bool) -> None:
        """Let go of what is held for a transfer; unknown ones are ignored."""
        with self._lock:
            link, uuids = self._held.pop(transfer, (None, []))
        for uuid in uuids:
            assert link is not None
            (link.release if was_fetched else link.withdraw)(uuid)

    def close(self) -> None:
        """Wait for what is in flight, join the threads and let go of every array and link."""
        super().close()
        self._links.close()
        for fetcher in self._fetchers.values():
            fetcher.close()
        self._fetching.clear()

    # ---- out

    def _start_transfer(self, action: StartTransfer) -> None:
        if action.destination in self._place:
            super()._start_transfer(action)
            return
        source, transfer = self._mesh(action.source), action.transfer
        link = self._links.towards(action.destination)
        tp, new_tp = source.plan.mesh.size, source.plan.config.topology.meshes[action.destination].tp
        route = plan(source.plan.model.num_kv_heads, tp, new_tp)

        def ready(staging: Staging) -> None:
            offer = self._make_offer(link, staging, source, route)
            with self._lock:
                self._held[transfer] = link, [part.uuid for part in offer.parts or (offer,)]
            self._offered(transfer, offer)

        def failed(error: Exception) -> None:
            self._post(TransferFailed(self._clock(), transfer, describe(error)))

        self._transfer_waiters[action.source].watch(source.gather(action, new_tp), ready, failed)

    def _make_offer(self, link: Link, staging: Staging, source: MeshWorker, route: Route) -> KVOffer:
        if self._member is None:
            return offer_staging(link, staging, source.plan.mesh, route)
        return offer_of_member(link, staging, source.plan.mesh, route, self._member)

    # ---- in

    def _tp_of(self, mesh: int) -> int:
        return self.meshes[0].plan.config.topology.meshes[mesh].tp

    def _fetched(self, fetching: _Fetching, staging: Staging | None, why: str, t: float) -> None:
        """Stage what has come, unless it is not needed any more, and say so."""
        message = fetching.message
        if self._fetching.get(message.transfer) is fetching:
            del self._fetching[message.transfer]
        if staging is None:
            self._post(TransferFailed(t, message.transfer, why))
            return
        if not fetching.is_dropped:
            tp = self._tp_of(message.source)
            self._staged[message.transfer] = Staged(staging, tp, message.bucket, message.destination)
        self._post(TransferReady(t, message.transfer))

    def _reset(self, mesh: int) -> None:
        for fetching in self._fetching.values():
            fetching.is_dropped |= fetching.message.destination == mesh
        super()._reset(mesh)


class _Fetcher:
    """A thread that does one thing after the other."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = EngineThread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], None]) -> None:
        """Do it after what was asked for before."""
        self._queue.put(work)

    def close(self) -> None:
        """Finish what is queued, then join the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        with own_settings():
            while (work := self._queue.get()) is not None:
                work()
                del work  # and what it holds
