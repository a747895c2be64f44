"""Requests on their way from one mesh to another: credit, staging and the transfers of each hand-off.

Invariants: nothing is sent before a slot and all pages for it are reserved at the destination (credit); transfers of a
hand-off are scattered in the order in which they were sent, and the one that brings the request's state comes last;
staging stays charged, on both meshes, from the gather to the scatter or, if nobody wants the KV any more, until the
transfer is over. Long prompts are sent in parts while they are still being prefilled. Control-plane module: no JAX.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from functools import partial

from ..config import EngineConfig, PoolSize
from ..paging.block_table import Handoff, Transfer
from ..protocol.actions import Action, DropTransfer, Scatter, StartTransfer
from .mesh_state import MeshState
from .request import Request, State, by_arrival
from .router import decode_rank

# A prompt of more chunks than this is sent in parts; for shorter ones a single transfer is better.
_CHUNKS_IN_ONE_TRANSFER = 2


class Departures:
    """All hand-offs of an engine."""

    def __init__(
        self,
        config: EngineConfig,
        pools: Sequence[PoolSize],
        meshes: Sequence[MeshState],
        emit: Callable[[Action], None],
    ):
        """`emit` takes the actions."""
        self._config, self._pools, self._meshes, self._emit = config, pools, meshes, emit
        self._caps = [config.pages_to_send(window) for window in config.windows]
        self._leaving: list[Request] = []
        self._transfers: dict[int, tuple[Transfer, Request | None]] = {}
        self._next = 0

    # ---- leaving

    def add(self, request: Request) -> None:
        """The request's prompt is dispatched: as soon as it has credit it goes."""
        insort(self._leaving, request, key=by_arrival)

    def depart(self) -> None:
        """Give credit, first come first served, and send all who have it, as far as pages and staging allow.

        Who has credit never waits for those who have none: they may wait for the very pages that he holds. One whose
        blocks are on their way to the decode mesh already, for another request, waits for those and holds back nobody.
        """
        may_ask = True
        for request in list(self._leaving):
            if request.handoff is None:
                if self._is_coming(request):
                    continue
                may_ask = may_ask and self._has_credit(request)
                if not may_ask:
                    continue
            if not self._send(request, is_last=True):
                return
            self._leaving.remove(request)

    def pipeline(self, request: Request) -> None:
        """A chunk is dispatched and more will come: send its full pages if the prompt is long."""
        assert request.home is not None
        is_long = request.to_prefill > _CHUNKS_IN_ONE_TRANSFER * self._config.chunk_size
        can_go = not self._meshes[request.home.mesh].spec.decodes and not self._leaving
        if is_long and can_go and self._has_credit(request):
            self._send(request, is_last=False)

    def migrate(self, request: Request, destination: int | None) -> bool:
        """Send a decoding request to another decoding mesh, `destination` or any; False: no room."""
        assert request.home is not None
        source = self._meshes[request.home.mesh]
        if not self._has_credit(request, destination):
            return False
        if not self._send(request, is_last=True):
            self.give_credit_back(request)
            return False
        del source.decoding[request.id]
        return True

    def _is_coming(self, request: Request) -> bool:
        """Whether the first block that a decode mesh lacks of this request is on its way there for another."""
        for mesh in self._meshes:
            if mesh.arriving:
                done = mesh.cache.hit(request.hashes, request.kv_len) // self._config.page_size
                if any(key in mesh.arriving for key in request.hashes[done : done + 1]):
                    return True
        return False

    def _has_credit(self, request: Request, destination: int | None = None) -> bool:
        """Reserve a seat where the request will decode, unless it has one."""
        if request.handoff is not None:
            return True
        assert request.home is not None
        home, tokens = request.home.mesh, max(request.to_prefill, request.kv_len)
        able = [
            mesh
            for mesh in self._meshes
            if mesh.spec.decodes and mesh.index != home and destination in (None, mesh.index)
        ]
        for mesh in sorted(able, key=partial(decode_rank, request)):
            seated = mesh.cache.seat_arrival(request.id, request.hashes, tokens, mesh.watermark)
            if seated is not None:
                request.handoff = Handoff(*seated)
                mesh.seated[request.id] = request
                for key in request.hashes[min(seated[1]) : tokens // self._config.page_size]:
                    mesh.arriving.setdefault(key, request)
                return True
        return False

    def _send(self, request: Request, *, is_last: bool) -> bool:
        """Send what is in the cache and was not sent; False: no staging. A part is of full pages only.

        With the last of it the source seat is free: whatever reuses it is dispatched after the gather.
        """
        home, handoff = request.home, request.handoff
        assert home is not None
        assert handoff is not None
        source, destination = home.mesh, handoff.seat.mesh
        tokens = request.kv_len
        stop = self._config.pages_for(tokens) if is_last else tokens // self._config.page_size
        # The pages of a window are known when its last token is: they go with the last transfer.
        stops = [stop if is_last or window is None else 0 for window in self._config.windows]
        counts = [max(0, stop - start) for stop, start in zip(stops, handoff.unsent, strict=True)]
        if not is_last and not any(counts):
            return True
        bucket = self._bucket(counts)
        staged = (self._staged(source, bucket), self._staged(destination, bucket))
        if self._meshes[source].staging < staged[0] or self._meshes[destination].staging < staged[1]:
            return False
        ranges = list(zip(handoff.unsent, stops, strict=True))
        from_pages, to_pages = (
            tuple(table.between(*limits) for table, limits in zip(seat.tables, ranges, strict=True))
            for seat in (home, handoff.seat)
        )
        transfer = Transfer(self._next, source, destination, staged, to_pages, is_last)
        self._next += 1
        self._charge(transfer, 1)
        self._transfers[transfer.number] = transfer, request
        handoff.transfers.append(transfer)
        handoff.unsent = [max(limits) for limits in ranges]
        slot = home.slot if is_last else None
        self._emit(StartTransfer(transfer.number, bucket, source, slot, from_pages, destination))
        if is_last:
            request.home = None
            known = min(tokens, request.prompt_len + request.confirmed)
            self._meshes[source].cache.remember(home, request.hashes, known)
            self._meshes[source].unseat(request, home)
        return True

    def _bucket(self, counts: Sequence[int]) -> int:
        """The smallest bucket in which every group finds room."""
        return next(
            bucket
            for bucket in self._config.handoff_buckets
            if all(count <= min(bucket, cap) for count, cap in zip(counts, self._caps, strict=True))
        )

    # ---- arriving

    def source(self, number: int) -> int | None:
        """The mesh that this transfer comes from; None once it is over."""
        return self._transfers[number][0].source if number in self._transfers else None

    def under_way_from(self, mesh: int) -> list[int]:
        """The transfers from this mesh that have not arrived, those that are not needed any more included."""
        return [n for n, (transfer, _) in self._transfers.items() if transfer.source == mesh and not transfer.is_ready]

    def owner(self, number: int) -> Request | None:
        """Whose transfer this is; None once nobody wants it."""
        return self._transfers[number][1] if number in self._transfers else None

    def arrived(self, number: int) -> None:
        """The transfer is over. One that nobody wants frees its staging."""
        if number not in self._transfers:
            return
        transfer, request = self._transfers[number]
        transfer.is_ready = True
        if request is None:
            self._forget(transfer)

    def settle(self, request: Request) -> bool:
        """Scatter what has arrived. True: that was the last of it, and the request is at home there.

        The last waits for the tokens of all steps before the hand-off: a token that stops the request needs no
        scatter, and tokens read by two threads stay in order.
        """
        handoff = request.handoff
        while handoff is not None and handoff.transfers and handoff.transfers[0].is_ready:
            transfer = handoff.transfers[0]
            if transfer.has_state and request.confirmed < request.dispatched:
                return False
            handoff.transfers.popleft()
            self._forget(transfer)
            slot = handoff.seat.slot if transfer.has_state else None
            self._emit(Scatter(transfer.number, transfer.destination, slot, transfer.pages))
            if transfer.has_state:
                request.home, request.handoff = handoff.seat, None
                mesh = self._meshes[handoff.seat.mesh]
                mesh.cache.remember(handoff.seat, request.hashes, request.kv_len)
                mesh.forget_arriving(request)
                return True
        return False

    # ---- giving up

    def leaves_from(self, request: Request, mesh: int) -> bool:
        """Whether KV of this request is on its way from this mesh."""
        return request.handoff is not None and any(t.source == mesh for t in request.handoff.transfers)

    def cancel(self, request: Request) -> None:
        """The request goes nowhere: off the list, credit back, transfers dropped."""
        if request in self._leaving:
            self._leaving.remove(request)
        if request.handoff is not None:
            self.give_credit_back(request)

    def give_credit_back(self, request: Request) -> None:
        """Take back the seat reserved for a request and drop what is on its way there."""
        handoff, request.handoff = request.handoff, None
        assert handoff is not None
        for transfer in handoff.transfers:
            self._emit(DropTransfer(transfer.number))
            if transfer.is_ready:
                self._forget(transfer)
            else:
                self._transfers[transfer.number] = transfer, None
        mesh = self._meshes[handoff.seat.mesh]
        mesh.forget_arriving(request)
        mesh.unseat(request, handoff.seat)

    def _forget(self, transfer: Transfer) -> None:
        del self._transfers[transfer.number]
        self._charge(transfer, -1)

    def _charge(self, transfer: Transfer, sign: int) -> None:
        for mesh, staged in zip((transfer.source, transfer.destination), transfer.staged, strict=True):
            self._meshes[mesh].staging -= sign * staged

    def _staged(self, mesh: int, bucket: int) -> int:
        return self._pools[mesh].transfer_bytes(bucket, self._caps)

    def check(self) -> None:
        """Raise unless staging is what transfers take."""
        for mesh, pool in zip(self._meshes, self._pools, strict=True):
            taken = sum(
                staged
                for transfer, _ in self._transfers.values()
                for end, staged in zip((transfer.source, transfer.destination), transfer.staged, strict=True)
                if end == mesh.index
            )
            if mesh.staging != pool.staging_bytes - taken:
                raise RuntimeError(f"mesh {mesh.index}: {mesh.staging} bytes of staging left, {taken} taken")
        for request in self._leaving:
            if request.state is not State.HANDOFF or request.home is None:
                raise RuntimeError(f"request {request.id} is {request.state} and about to leave")
