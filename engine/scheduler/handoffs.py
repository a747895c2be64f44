"""Requests on their way from one mesh to another: every change of state and placement that a hand-off makes.

`begin` or `migrate` moves a request to HANDOFF, `dispatch` and `pipeline` reserve pages for it (credit) and send its
KV, `complete` moves it to DECODE at its destination; `cancel` ends it early.

Invariants: nothing is sent before a slot and all pages for it are reserved at the destination; transfers of a hand-off
are scattered in the order in which they were sent, and the one that brings the request's state comes last; staging
stays charged, on both meshes, from the gather to the scatter or, if the KV is no longer needed, until the transfer is
over. Long prompts are sent in parts while they are still being prefilled. A request whose blocks are on their way to a
decode mesh already sleeps until they are there or will not come. It moves no bytes: the executor does.
"""

from collections.abc import Sequence

from ..paging.block_table import Placement
from ..paging.prefix_index import members
from ..protocol.actions import DropTransfer, Scatter, StartTransfer
from .credit_queue import CreditQueue
from .mesh_state import MeshState, SharedState
from .priority_inheritance import PriorityInheritance
from .request import Handoff, Request, State, Transfer
from .router import Router
from .staging import Staging

# A prompt of more chunks than this is sent in parts; for shorter ones a single transfer is better.
_CHUNKS_IN_ONE_TRANSFER = 2


class Handoffs:
    """All hand-offs of an engine."""

    def __init__(self, shared: SharedState, router: Router, staging: Staging):
        """Begin without hand-offs."""
        self._shared, self._router, self.staging = shared, router, staging
        self._config, self._meshes, self._requests = shared.config, shared.meshes, shared.requests
        self._costs, self._counters, self._emit = shared.costs, shared.counters, shared.emit
        self._waiting = CreditQueue(shared.room, shared.arriving)  # in HANDOFF, and not all sent
        self.inheritance = PriorityInheritance(shared, self._waiting)
        self._transfers: dict[int, Transfer] = {}
        self._next = 0

    # ---- leaving the source

    def begin(self, request: Request) -> None:
        """Begin the hand-off of a request whose prompt is dispatched: it is sent as soon as it has credit."""
        assert request.placement is not None
        request.move_to(State.HANDOFF)
        self._waiting.add(request)
        self._meshes[request.placement.mesh].kept.add(request.placement)
        self._shared.room.touch(request.placement.mesh)

    def migrate(self, request: Request, destination: int | None) -> bool:
        """Send a decoding request to another decoding mesh, `destination` or any (None).

        Return False if the request is not decoding or there is no room.
        """
        if request.state is not State.DECODE or not self._has_credit(request, destination):
            return False
        if not self._send(request, is_last=True):
            self.release_credit(request)
            return False
        self._counters.migrations += 1
        request.move_to(State.HANDOFF)
        return True

    def settle_here(self, request: Request) -> None:
        """Let a request that waits for credit, or holds it and has sent nothing, decode where its KV is."""
        assert request.placement is not None
        mesh = self._meshes[request.placement.mesh]
        if request.state is State.HANDOFF:
            self._end_waiting(request, mesh)
            request.move_to(State.DECODE)
            mesh.wake()
        if request.handoff is not None:
            self._drop(request)

    def dispatch(self) -> None:
        """Give credit in the policy's order, and send all requests that hold it, as far as pages and staging allow.

        Requests that hold credit are never blocked by requests that do not; the latter may be waiting for pages the
        former hold. A request whose blocks are on their way to the decode mesh already, for another request, waits for
        those blocks and holds back no other request.
        """
        while (request := self._waiting.first()) is not None:
            if (request.handoff is not None or self._ask(request)) and not self._send(request, is_last=True):
                return

    @property
    def waiting(self) -> CreditQueue:
        """Return the requests in HANDOFF that were not sent in full, to be looked at."""
        return self._waiting

    @property
    def first_refused(self) -> Request | None:
        """Return the first that asks for credit, if it got none the last time."""
        return self._waiting.first_refused

    def _ask(self, request: Request) -> bool:
        """Ask for credit; False: the request got none, or sleeps."""
        block = self._coming(request)
        if block is not None:
            self._waiting.sleep(request, block)
            self.inheritance.lend("arriving", block, request.order)
        elif self._has_credit(request):
            self._waiting.grant(request)
            return True
        else:
            self._waiting.refusal.note(request, request.hashes)
        return False

    def _end_waiting(self, request: Request, mesh: MeshState) -> None:
        """Take a request out of those that wait, which is sent or will not be."""
        assert request.placement is not None
        mesh.kept.remove(request.placement)
        self._waiting.remove(request)

    def pipeline(self, request: Request) -> None:
        """Send the full pages of a long prompt early, after a chunk that is not its last was dispatched."""
        assert request.placement is not None
        is_long = request.to_prefill > _CHUNKS_IN_ONE_TRANSFER * self._config.chunk_size
        stays = self._meshes[request.placement.mesh].decodes and request.handoff is None
        can_go = not stays and not self._waiting
        if is_long and can_go and self._has_credit(request):
            self._send(request, is_last=False)

    def _coming(self, request: Request) -> bytes | None:
        """Find the first block of the request that a decode mesh lacks, if it is on its way there for another."""
        arriving, hashes = self._shared.arriving, request.hashes
        if not arriving or arriving.keys().isdisjoint(hashes):
            return None
        for index, block in enumerate(hashes[: request.kv_len // self._config.page_size + 1]):
            for mesh in members(arriving.get(block, 0)):
                if self._meshes[mesh].pages.hit(hashes, request.kv_len) == index * self._config.page_size:
                    return block
        return None

    def _has_credit(self, request: Request, destination: int | None = None) -> bool:
        """Reserve a placement where the request will decode, unless it has one; return whether it has one now."""
        if request.handoff is not None:
            return True
        assert request.placement is not None
        source, tokens = request.placement.mesh, max(request.to_prefill, request.kv_len)
        for mesh in self._router.for_decoding(request, tokens, source, destination):
            reserved = mesh.pages.reserve(request.id, request.hashes, tokens, mesh.watermark)
            if reserved is not None:
                placement, unsent = reserved
                request.handoff = Handoff(placement, unsent)
                mesh.add(request)
                mesh.arriving.expect(request.hashes[min(unsent) : tokens // self._config.page_size], placement)
                self._waiting.refusal.has_news(request.hashes, min(unsent))  # it may sleep for these
                self._router.chosen(request, "decode", mesh)
                return True
        return False

    def _send(self, request: Request, *, is_last: bool) -> bool:
        """Send the request's KV that was not sent yet; return False if there is no staging for it.

        A part that is not the last has full pages only. With the last part the placement on the source is freed:
        whatever reuses its pages is dispatched after the gather.
        """
        placement, handoff = request.placement, request.handoff
        assert placement is not None
        assert handoff is not None
        tokens = request.kv_len
        stop = self._config.pages_for(tokens) if is_last else tokens // self._config.page_size
        # The pages of a window are known when its last token is: they go with the last transfer.
        stops = [stop if is_last or window is None else 0 for window in self._config.windows]
        counts = [max(0, stop - start) for stop, start in zip(stops, handoff.unsent, strict=True)]
        if not is_last and not any(counts):
            return True
        bucket = self.staging.bucket(counts)
        staged = self.staging.ask(placement.mesh, handoff.placement.mesh, bucket)
        if staged is None:
            return False
        self._start(request, placement, handoff, bucket, staged, stops, is_last)
        if is_last:
            source = self._meshes[placement.mesh]
            if request.state is State.HANDOFF:
                self._end_waiting(request, source)
            request.placement = None
            source.pages.remember(placement, request.hashes, min(tokens, request.prompt_len + request.confirmed))
            source.remove(request, placement)
        return True

    def _start(
        self,
        request: Request,
        placement: Placement,
        handoff: Handoff,
        bucket: int,
        staged: tuple[int, int],
        stops: Sequence[int],
        is_last: bool,
    ) -> None:
        """Start the transfer of each group's pages up to its stop."""
        ranges = list(zip(handoff.unsent, stops, strict=True))
        from_pages, to_pages = (
            tuple(table.between(*limits) for table, limits in zip(end.tables, ranges, strict=True))
            for end in (placement, handoff.placement)
        )
        source, destination = placement.mesh, handoff.placement.mesh
        transfer = Transfer(self._next, source, destination, staged, to_pages, is_last, request.id)
        self._next += 1
        self.staging.take(transfer)
        self._transfers[transfer.number] = transfer
        handoff.transfers.append(transfer)
        handoff.has_sent = True
        handoff.unsent = [max(limits) for limits in ranges]
        slot = placement.slot if is_last else None
        action = StartTransfer(transfer.number, bucket, source, slot, from_pages, destination)
        self._costs.begin_transfer(action, staged[0])
        self._emit(action)

    # ---- reaching the destination

    def leaving(self, mesh: int) -> list[Request]:
        """List the requests whose KV is on its way from this mesh."""
        transfers = [transfer for transfer in self._transfers.values() if transfer.source == mesh]
        return [self._requests[x.request_id] for x in transfers if x.request_id is not None]

    def under_way_from(self, mesh: int) -> list[int]:
        """List the transfers from this mesh that have not arrived, those that are not needed any more included."""
        return [number for number, x in self._transfers.items() if x.source == mesh and not x.is_ready]

    def request_of(self, number: int) -> int | None:
        """Return the id of the request whose KV a transfer moves; None: it is over, or not needed any more."""
        transfer = self._transfers.get(number)
        return None if transfer is None else transfer.request_id

    def end_transfer(self, number: int) -> Transfer | None:
        """Note that a transfer is over, and return it; if it is no longer needed, free its staging and return None."""
        transfer = self._transfers.get(number)
        if transfer is None:
            return None
        transfer.is_ready = True
        if transfer.request_id is None:
            self._forget(transfer)
            return None
        return transfer

    def transfer_ready(self, number: int, now: float) -> None:
        """Continue the hand-off whose transfer has arrived."""
        transfer = self.end_transfer(number)
        if transfer is not None and transfer.request_id is not None:
            self.complete(self._requests[transfer.request_id], now)

    def complete(self, request: Request, now: float) -> None:
        """Scatter the transfers of a hand-off that have arrived; after the last the request decodes at its destination.

        The last scatter waits for the tokens of all steps before the hand-off: a token that stops the request needs no
        scatter, and tokens read by two threads stay in order.
        """
        handoff = request.handoff
        while handoff is not None and handoff.transfers and handoff.transfers[0].is_ready:
            transfer = handoff.transfers[0]
            if transfer.has_state and request.confirmed < request.dispatched:
                return
            handoff.transfers.popleft()
            self._forget(transfer)
            slot = handoff.placement.slot if transfer.has_state else None
            self._emit(Scatter(transfer.number, transfer.destination, slot, transfer.pages))
            if transfer.has_state:
                self._arrive(request, handoff.placement, now)
                return

    def _arrive(self, request: Request, placement: Placement, now: float) -> None:
        request.placement, request.handoff = placement, None
        mesh = self._meshes[placement.mesh]
        mesh.pages.remember(placement, request.hashes, request.kv_len)
        mesh.wake()
        if request.timeline.kv_ready is None:
            request.timeline.kv_ready = now
        request.move_to(State.DECODE)
        self._wake(mesh.end_wait(placement))

    # ---- giving up

    def cancel(self, request: Request) -> None:
        """End a request's hand-off, if there is one: free its credit and drop its transfers."""
        self.inheritance.forget(request)
        if request.state is State.HANDOFF and request.placement is not None:
            self._end_waiting(request, self._meshes[request.placement.mesh])
        if request.handoff is not None:
            self._drop(request)

    def release_credit(self, request: Request) -> None:
        """Free the placement that is reserved for a request and drop what is on its way there; it asks again."""
        if request.state is State.HANDOFF:
            self._waiting.withdraw(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        handoff, request.handoff = request.handoff, None
        assert handoff is not None
        for transfer in handoff.transfers:
            self._emit(DropTransfer(transfer.number))
            transfer.request_id = None
            if transfer.is_ready:
                self._forget(transfer)
        self._wake(self._meshes[handoff.placement.mesh].remove(request, handoff.placement))

    def _wake(self, blocks: Sequence[bytes]) -> None:
        """Let those ask that sleep for blocks which have arrived or will not come."""
        self.inheritance.repay("arriving", blocks)
        self._waiting.wake(blocks)

    def _forget(self, transfer: Transfer) -> None:
        """Give back what a transfer that is over has taken."""
        del self._transfers[transfer.number]
        self.staging.give_back(transfer)
        source = self._meshes[transfer.source]
        if source.draining is not None:  # the next may leave
            source.wake()

    def check(self) -> None:
        """Raise unless staging and queue are as the hand-offs are."""
        self.staging.check(self._transfers.values())
        self._waiting.check()
        self.inheritance.check(self._requests.values())
