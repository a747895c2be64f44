"""Policy: which mesh does what next. Events in through `on`, actions out through `actions`.

Invariants: a prompt's pages and slot on its prefill mesh are reserved at once before its first chunk; its decode slot
and pages (credit) are reserved at once before its transfer; a transfer is scattered only once it is ready; pages and
slots are freed as soon as the last action that reads them has been given out, because each mesh performs actions in
order. Decode results are matched by (slot, epoch), so a late one never touches the slot's next tenant.
No clock, randomness, I/O or JAX: a replay of the same events gives the same actions.
"""

from collections import deque
from collections.abc import Sequence

from .config import EngineConfig, PoolSize, bucket_for
from .mesh_state import Handoff, MeshState
from .pages import PageAllocator, SlotTable
from .protocol import (
    AbortRequested,
    Action,
    Arrived,
    AssignPages,
    Chunk,
    Decode,
    DecodeRow,
    DropTransfer,
    Event,
    Finish,
    FinishReason,
    MeshFailed,
    Outcome,
    Prefill,
    Scatter,
    StartTransfer,
    StepDone,
    TransferFailed,
    TransferReady,
)
from .request import Request, State
from .router import least_loaded


class Scheduler:
    """One engine's decisions over all its meshes."""

    def __init__(self, config: EngineConfig, pools: Sequence[PoolSize]):
        """`pools[i]` is the size of mesh i's KV memory."""
        self.config = config
        self.meshes = [
            MeshState(i, spec, PageAllocator(pool.pages), SlotTable(config.max_num_seqs), pool.staging)
            for i, (spec, pool) in enumerate(zip(config.topology.meshes, pools, strict=True))
        ]
        self.requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._awaiting_credit: deque[Request] = deque()
        self._handoffs: dict[int, Handoff] = {}
        self._out: list[Action] = []
        self._now = 0.0
        self._next_step = 0
        self._next_transfer = 0

    # ---- events

    def on(self, event: Event) -> None:
        """Take in what happened. Decisions wait for `actions`."""
        self._now = max(self._now, event.t)  # stamps of several threads may arrive out of order
        match event:
            case Arrived(request=request):
                self.requests[request.id] = request
                self._waiting.append(request)
            case AbortRequested(request_id=request_id):
                if request_id in self.requests:
                    self._finish(self.requests[request_id], State.ABORTED, "abort")
            case StepDone(mesh=mesh, step=step, outcomes=outcomes):
                self._on_step_done(self.meshes[mesh], step, outcomes)
            case TransferReady(transfer=transfer):
                self._on_transfer_ready(transfer)
            case TransferFailed(transfer=transfer, reason=reason):
                if transfer in self._handoffs:
                    self._finish(self._handoffs[transfer].request, State.FAILED, "error", reason)
            case MeshFailed(mesh=mesh, reason=reason):
                self._on_mesh_failed(self.meshes[mesh], reason)

    def owner(self, mesh: int, row: Chunk | DecodeRow) -> Request | None:
        """The running request that a result for this row belongs to; None when it came too late.

        A prompt's seat may be gone before its first token is read; that token is right for as long as the request
        lives. A decode row belongs to its tenancy only.
        """
        if isinstance(row, Chunk):
            return self.requests.get(row.request_id)
        request_id = self.meshes[mesh].slots.tenant(row.slot, row.epoch)
        return None if request_id is None else self.requests[request_id]

    def is_in_flight(self, mesh: int, step: int) -> bool:
        """Whether this step's result is still awaited."""
        return step in self.meshes[mesh].in_flight

    def _on_step_done(self, mesh: MeshState, step: int, outcomes: Sequence[Outcome]) -> None:
        if step not in mesh.in_flight:  # dispatched before the mesh failed
            return
        mesh.in_flight.remove(step)
        for outcome in outcomes:
            self._confirm_token(self.requests[outcome.request_id], outcome.stopped)

    def _confirm_token(self, request: Request, stopped: bool) -> None:
        request.confirmed += 1
        if request.confirmed == 1:
            for mesh in self.meshes:
                mesh.unanswered.pop(request.id, None)
        request.timeline.tokens.append(self._now)
        if stopped:
            self._finish(request, State.FINISHED, "stop")
        elif request.confirmed == request.max_tokens:
            self._finish(request, State.FINISHED, "length")
        elif request.state is State.HANDOFF:
            self._settle_handoff(request)

    def _on_transfer_ready(self, transfer: int) -> None:
        handoff = self._handoffs.get(transfer)
        if handoff is not None:  # not dropped while it travelled
            handoff.is_ready = True
            handoff.request.timeline.kv_ready = self._now
            self._settle_handoff(handoff.request)

    def _settle_handoff(self, request: Request) -> None:
        """Scatter once the KV has arrived and the first token was read: a token that stops needs no scatter, and
        tokens read by two threads stay in order."""
        transfer = self._transfer_of(request)
        if transfer is None or not self._handoffs[transfer].is_ready or request.confirmed == 0:
            return
        del self._handoffs[transfer]
        seat = request.credit
        assert seat is not None
        request.home, request.credit = seat, None
        request.move_to(State.DECODE)
        self.meshes[seat.mesh].decoding[request.id] = request
        pages = seat.pages[: self.config.pages_for(request.prompt_len)]
        self._out.append(AssignPages(seat.mesh, seat.slot, seat.pages))
        self._out.append(Scatter(transfer, seat.mesh, seat.slot, pages))

    def _transfer_of(self, request: Request) -> int | None:
        return next((key for key, handoff in self._handoffs.items() if handoff.request is request), None)

    def _on_mesh_failed(self, mesh: MeshState, reason: str) -> None:
        """Whoever has KV here, or KV on its way from here or to here, fails."""
        mesh.in_flight.clear()
        leaving = {handoff.request.id for handoff in self._handoffs.values() if handoff.source == mesh.index}
        for request in list(self.requests.values()):
            seats = [seat.mesh for seat in (request.home, request.credit) if seat is not None]
            if mesh.index in seats or request.id in leaving:
                self._finish(request, State.FAILED, "error", reason)

    def _finish(self, request: Request, state: State, reason: FinishReason, error: str | None = None) -> None:
        self._leave_queue(request)
        self._leave_seats(request)
        request.move_to(state)
        request.timeline.finish = self._now
        del self.requests[request.id]
        self._out.append(Finish(request.id, reason, error))

    def _leave_queue(self, request: Request) -> None:
        if request.state is State.WAITING:
            self._waiting.remove(request)
        elif request.state is State.PREFILL and request.prefilled < request.prompt_len:
            assert request.home is not None
            self.meshes[request.home.mesh].prefilling.remove(request)
        elif request.state is State.HANDOFF and request.credit is None:
            self._awaiting_credit.remove(request)

    def _leave_seats(self, request: Request) -> None:
        transfer = self._transfer_of(request)
        if transfer is not None:
            del self._handoffs[transfer]
            self._out.append(DropTransfer(transfer))
        for mesh in self.meshes:
            mesh.unanswered.pop(request.id, None)
            mesh.decoding.pop(request.id, None)
        for seat in (request.home, request.credit):
            if seat is not None:
                self.meshes[seat.mesh].unseat(request, seat)
        request.home = request.credit = None

    # ---- decisions

    def actions(self) -> list[Action]:
        """Everything that can be dispatched now, in order. Freed pages may let more in, hence the loop."""
        before = -1
        while before != len(self._out):
            before = len(self._out)
            self._admit_waiting()
            for mesh in self.meshes:
                while mesh.can_step and self._dispatch_step(mesh):
                    self._grant_credit()  # at once: behind the mesh's next step, a gather would wait for that too
            self._grant_credit()
        out, self._out = self._out, []
        return out

    def _admit_waiting(self) -> None:
        """First come, first served: a prompt that does not fit yet holds back those behind it."""
        while self._waiting:
            request = self._waiting[0]
            able = [m for m in self.meshes if m.spec.prefills and m.has_room(self._pages_to_prefill(request, m))]
            mesh = least_loaded(able, lambda mesh: (mesh.prefill_load, -mesh.slots.num_free))
            if mesh is None:
                return
            self._waiting.popleft()
            request.home = mesh.seat(request, self._pages_to_prefill(request, mesh))
            request.move_to(State.PREFILL)
            mesh.prefilling.append(request)
            mesh.unanswered[request.id] = request
            self._out.append(AssignPages(mesh.index, request.home.slot, request.home.pages))

    def _pages_to_prefill(self, request: Request, mesh: MeshState) -> int:
        return self._pages_to_decode(request) if mesh.spec.decodes else self.config.pages_for(request.prompt_len)

    def _pages_to_decode(self, request: Request) -> int:
        """Prompt and completion at once: nothing is preempted yet, so nothing may run out on its way.

        The last token is never fed, so it needs no place.
        """
        return self.config.pages_for(request.prompt_len + request.max_tokens - 1)

    def _dispatch_step(self, mesh: MeshState) -> bool:
        """One step if there is work; a mesh that does both alternates."""
        rows = [request for request in mesh.decoding.values() if request.can_decode]
        if mesh.prefilling and not (rows and mesh.last_was_prefill):
            self._dispatch_prefill(mesh)
        elif rows:
            self._dispatch_decode(mesh, rows)
        else:
            return False
        return True

    def _dispatch_prefill(self, mesh: MeshState) -> None:
        chunks: list[Chunk] = []
        budget = self.config.prefill_buckets[-1]
        while mesh.prefilling and budget > 0 and len(chunks) < self.config.prefill_rows:
            chunk = self._take_chunk(mesh, budget)
            chunks.append(chunk)
            budget -= chunk.length
        used = self.config.prefill_buckets[-1] - budget
        bucket = bucket_for(used, self.config.prefill_buckets)
        self._out.append(Prefill(mesh.index, self._new_step(mesh), bucket, tuple(chunks)))
        mesh.last_was_prefill = True

    def _take_chunk(self, mesh: MeshState, budget: int) -> Chunk:
        """The next chunk of the first prompt in line; with its last chunk the prompt leaves the line."""
        request = mesh.prefilling[0]
        seat = request.home
        assert seat is not None
        start = request.prefilled
        length = min(budget, request.prompt_len - start)
        if start == 0:
            request.timeline.prefill_start = self._now
        request.prefilled += length
        is_last = request.prefilled == request.prompt_len
        if is_last:
            mesh.prefilling.popleft()
            self._leave_prefill(request, mesh)
        return Chunk(request.id, seat.slot, seat.epoch, start, length, is_last)

    def _leave_prefill(self, request: Request, mesh: MeshState) -> None:
        """Where a prompt goes once its last chunk is dispatched. A one-token request only waits for that token."""
        request.dispatched = 1
        if request.max_tokens == 1:
            return
        if mesh.spec.decodes:
            request.move_to(State.DECODE)
            mesh.decoding[request.id] = request
        else:
            request.move_to(State.HANDOFF)
            self._awaiting_credit.append(request)

    def _dispatch_decode(self, mesh: MeshState, rows: Sequence[Request]) -> None:
        bucket = bucket_for(len(rows), self.config.decode_buckets)
        self._out.append(Decode(mesh.index, self._new_step(mesh), bucket, tuple(map(_decode_row, rows))))
        for request in rows:
            request.dispatched += 1
        mesh.last_was_prefill = False

    def _new_step(self, mesh: MeshState) -> int:
        step, self._next_step = self._next_step, self._next_step + 1
        mesh.in_flight.add(step)
        return step

    def _grant_credit(self) -> None:
        """Reserve decode seats, first come first served, and start the transfers that they allow."""
        while self._awaiting_credit:
            request = self._awaiting_credit[0]
            bucket = bucket_for(self.config.pages_for(request.prompt_len), self.config.handoff_buckets)
            mesh = self._decode_mesh_for(request, bucket)
            if mesh is None:
                return
            self._awaiting_credit.popleft()
            request.credit = mesh.seat(request, self._pages_to_decode(request))
            self._start_transfer(request, bucket)

    def _decode_mesh_for(self, request: Request, staged_pages: int) -> MeshState | None:
        pages = self._pages_to_decode(request)
        staging_left = [mesh.staging for mesh in self.meshes]
        for handoff in self._handoffs.values():
            staging_left[handoff.source] -= handoff.staged_pages
            staging_left[handoff.destination] -= handoff.staged_pages
        source = request.home
        if source is None or staging_left[source.mesh] < staged_pages:
            return None
        able = [mesh for mesh in self.meshes if mesh.spec.decodes and mesh.has_room(pages)]
        able = [mesh for mesh in able if staging_left[mesh.index] >= staged_pages]
        return least_loaded(able, lambda mesh: (-mesh.pages.num_free,))

    def _start_transfer(self, request: Request, bucket: int) -> None:
        """The source seat is free at once: whatever reuses it is dispatched after the gather."""
        source, credit = request.home, request.credit
        assert source is not None
        assert credit is not None
        transfer, self._next_transfer = self._next_transfer, self._next_transfer + 1
        self._handoffs[transfer] = Handoff(request, source.mesh, credit.mesh, bucket)
        self._out.append(StartTransfer(transfer, bucket, source.mesh, source.slot, source.pages, credit.mesh))
        self.meshes[source.mesh].unseat(request, source)
        request.home = None

    def check_integrity(self) -> None:
        """Raise if a page or slot is lost or doubled, or if anyone but a request that is here holds one."""
        seats: list[set[str]] = [set() for _ in self.meshes]
        for request in self.requests.values():
            for seat in (request.home, request.credit):
                if seat is not None:
                    seats[seat.mesh].add(request.id)
        for mesh, seated in zip(self.meshes, seats, strict=True):
            mesh.pages.check_integrity()
            mesh.slots.check_integrity()
            if mesh.pages.holders != seated or mesh.slots.tenants != seated:
                raise RuntimeError(f"mesh {mesh.index}: seats of {seated}, held by {mesh.pages.holders}")


def _decode_row(request: Request) -> DecodeRow:
    """Fed is the last sampled token, at position prompt_len + dispatched - 1; with it the cache holds this many."""
    seat = request.home
    assert seat is not None
    return DecodeRow(seat.slot, seat.epoch, request.prompt_len + request.dispatched)
