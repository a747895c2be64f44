"""Policy: which mesh does what next. Events in through `on`, actions out through `actions`.

Invariants: a prompt's pages and slot on its prefill mesh are reserved at once before its first chunk, its decode slot
and pages (credit) at once before its first transfer; a transfer is scattered only once it is ready; pages and slots are
freed as soon as the last action that reads them has been given out, because each mesh performs actions in order. A
decoding request takes pages as it grows; where none are left the latest arrival on that mesh gives its own up, so the
earliest always goes on. A result belongs to a request's run: one of an earlier run changes nothing.
No clock, randomness, I/O or JAX: a replay of the same events gives the same actions (`decision_log.py`).
"""

from collections.abc import Sequence

from ..config import EngineConfig, PoolSize, bucket_for
from ..metrics.counters import Tally
from ..paging.mesh_pages import MeshCache
from ..protocol.actions import Action, Chunk, Decode, DecodeRow, Finish, FinishReason, Fused, Prefill
from ..protocol.events import (
    AbortRequested,
    Arrived,
    Event,
    Hold,
    MeshFailed,
    MigrateRequested,
    Outcome,
    PreemptRequested,
    RequestFacts,
    Resume,
    StepDone,
    TransferFailed,
    TransferReady,
)
from ..protocol.timeline import Timeline
from .admission import Admission
from .handoffs import Departures
from .mesh_state import MeshState
from .request import Request, State, by_arrival


class Scheduler:
    """One engine's decisions over all its meshes."""

    def __init__(self, config: EngineConfig, pools: Sequence[PoolSize]):
        """`pools[i]` is the size of mesh i's KV memory."""
        self.config = config
        self._out: list[Action] = []
        self.meshes = [
            MeshState(i, spec, MeshCache(i, config, pool.pages, self._out.append), pool.staging_bytes)
            for i, (spec, pool) in enumerate(zip(config.topology.meshes, pools, strict=True))
        ]
        self.requests: dict[int, Request] = {}
        self.tally = Tally()
        self._departures = Departures(config, pools, self.meshes, self._out.append)
        self._admission = Admission(config, self.meshes, self.requests, self.tally)
        self._now = 0.0
        self._next_step = 0
        self._next_number = 0
        self._next_run = 0

    # ---- events

    def on(self, event: Event) -> None:
        """Take in what happened. Decisions wait for `actions`."""
        self._now = max(self._now, event.t)  # stamps of several threads may arrive out of order
        match event:
            case Arrived(t=t, facts=facts):
                self._on_arrival(t, facts)
            case AbortRequested(request_id=name) if name in self.requests:
                self._finish(self.requests[name], State.ABORTED, "abort")
            case PreemptRequested(request_id=name) if name in self.requests:
                self._preempt(self.requests[name])
            case MigrateRequested(request_id=name, destination=destination) if name in self.requests:
                self._migrate(self.requests[name], destination)
            case StepDone(mesh=mesh, step=step, outcomes=outcomes):
                self._on_step_done(self.meshes[mesh], step, outcomes)
            case TransferReady(transfer=number):
                self._departures.arrived(number)
                self._settle(self._departures.owner(number))
            case TransferFailed(transfer=number, reason=reason):
                self._on_transfer_failed(number, reason)
            case MeshFailed(mesh=mesh, reason=reason):
                self._on_mesh_failed(self.meshes[mesh], reason)
            case Hold():
                self._admission.is_held = True
            case Resume():
                self._on_resume()

    def owner(self, row: Chunk | DecodeRow) -> Request | None:
        """The running request that a result for this row belongs to; None when it came too late."""
        request = self.requests.get(row.request_id)
        return request if request is not None and request.run == row.run else None

    def is_in_flight(self, mesh: int, step: int) -> bool:
        """Whether this step's result is still awaited."""
        return step in self.meshes[mesh].in_flight

    def transfers_from(self, mesh: int) -> list[int]:
        """The transfers that leave this mesh and have not arrived."""
        return self._departures.under_way_from(mesh)

    @property
    def is_drained(self) -> bool:
        """Whether no request has started: with admission held, nothing will."""
        return all(request.restarts == 0 and request.state is State.WAITING for request in self.requests.values())

    def _on_arrival(self, t: float, facts: RequestFacts) -> None:
        request = Request(facts, self._next_number, Timeline(t), to_prefill=facts.prompt_len)
        self._next_number += 1
        self._begin_run(request)
        if self.config.prefix_cache:
            request.hashes = list(facts.block_hashes)
        self.requests[request.id] = request
        self._admission.add(request)

    def _begin_run(self, request: Request) -> None:
        """Names may come again, and results of an ended request may come late: a run's number never comes again."""
        request.run, self._next_run = self._next_run, self._next_run + 1

    def _on_step_done(self, mesh: MeshState, step: int, outcomes: Sequence[Outcome]) -> None:
        if step not in mesh.in_flight:  # dispatched before the mesh failed
            return
        mesh.in_flight.remove(step)
        for outcome in outcomes:
            self._confirm_token(self.requests[outcome.request_id], outcome)

    def _confirm_token(self, request: Request, outcome: Outcome) -> None:
        request.confirmed += 1
        for mesh in self.meshes:
            if mesh.unanswered:
                mesh.unanswered.pop(request.id, None)
        line = request.timeline
        line.tokens.append(self._now)
        if line.prefill_end is None:
            line.prefill_end = self._now
        if outcome.block_hash is not None and self.config.prefix_cache and not self.config.deterministic:
            request.hashes.append(outcome.block_hash)
        if outcome.stopped:
            self._finish(request, State.FINISHED, "stop")
        elif request.confirmed == request.max_tokens:
            self._finish(request, State.FINISHED, "length")
        else:
            self._settle(request)

    def _settle(self, request: Request | None) -> None:
        """Scatter what has arrived; with the last of it the request is at home on the mesh it went to."""
        if request is None or not self._departures.settle(request):
            return
        if request.timeline.kv_ready is None:
            request.timeline.kv_ready = self._now
        request.move_to(State.DECODE)
        assert request.home is not None
        self.meshes[request.home.mesh].decoding[request.id] = request

    def _on_transfer_failed(self, number: int, reason: str) -> None:
        request, source = self._departures.owner(number), self._departures.source(number)
        self._departures.arrived(number)
        if request is not None:
            request.suspects = source  # a mesh that is lost shows in its transfers first
            self._retry(request, source, reason)

    def _on_mesh_failed(self, mesh: MeshState, reason: str) -> None:
        """Whoever has KV here, or KV on its way from here or to here, starts again."""
        mesh.in_flight.clear()
        for request in sorted(self.requests.values(), key=by_arrival):
            is_elsewhere = request.home is not None and request.home.mesh != mesh.index
            leaves = self._departures.leaves_from(request, mesh.index)
            if is_elsewhere and not leaves and request.id in mesh.seated:
                self._departures.give_credit_back(request)
            elif leaves or request.id in mesh.seated:
                self._lose(request, mesh.index, reason)
        mesh.cache.flush()

    def _lose(self, request: Request, mesh: int, reason: str) -> None:
        if request.suspects == mesh:  # its transfer failed for the same reason, and has cost it a try already
            request.suspects = None
            self._start_over(request, keeps_pages=False)
        else:
            self._retry(request, mesh, reason)

    def _retry(self, request: Request, lost_on: int | None, reason: str) -> None:
        request.retries += 1
        if request.retries > self.config.max_retries:
            tries = f" (after {request.retries} tries)" if request.retries > 1 else ""
            self._finish(request, State.FAILED, "error", reason + tries)
        else:
            request.lost_on = lost_on
            self.tally.retries += 1
            self._start_over(request, keeps_pages=False)

    def _on_resume(self) -> None:
        self._admission.is_held = False
        for mesh in self.meshes:
            mesh.cache.flush()

    # ---- leaving

    def _finish(self, request: Request, state: State, reason: FinishReason, error: str | None = None) -> None:
        self._leave(request, keeps_pages=True)
        request.move_to(state)
        request.timeline.finish = self._now
        del self.requests[request.id]
        self._out.append(Finish(request.id, reason, error))

    def _preempt(self, request: Request) -> None:
        """Give up the request's KV; it waits for its turn, before all that arrived later."""
        if request.state in (State.PREFILL, State.HANDOFF, State.DECODE):
            self.tally.preemptions += 1
            self._start_over(request, keeps_pages=True)

    def _start_over(self, request: Request, *, keeps_pages: bool) -> None:
        """Back to WAITING. What was generated is prefilled with the prompt, or in deterministic mode decoded again."""
        self._leave(request, keeps_pages=keeps_pages)
        request.move_to(State.WAITING)
        self._begin_run(request)
        request.restarts += 1
        request.prefilled = request.dispatched = 0
        request.forced = request.confirmed if self.config.deterministic else 0
        request.to_prefill = request.prompt_len + request.confirmed - request.forced
        self._admission.add(request)

    def _leave(self, request: Request, *, keeps_pages: bool) -> None:
        """Out of every queue and seat. `keeps_pages`: its full pages stay in the prefix cache."""
        if request.state is State.WAITING:
            self._admission.remove(request)
            return
        self._departures.cancel(request)
        for mesh in self.meshes:
            mesh.unanswered.pop(request.id, None)
        seat, request.home = request.home, None
        if seat is None:
            return
        mesh = self.meshes[seat.mesh]
        if request in mesh.prefilling:
            mesh.prefilling.remove(request)
            mesh.computing = {key: by for key, by in mesh.computing.items() if by is not request}
        mesh.decoding.pop(request.id, None)
        if keeps_pages:
            known = request.prompt_len + request.confirmed
            mesh.cache.remember(seat, request.hashes, min(request.kv_len, known))
        mesh.unseat(request, seat)

    # ---- decisions

    def actions(self) -> list[Action]:
        """Everything that can be dispatched now, in order. Freed pages may let more in, hence the loop."""
        before = (-1, -1)
        while before != (len(self._out), self.tally.preemptions):
            before = len(self._out), self.tally.preemptions
            self._admission.admit()
            for mesh in self.meshes:
                while mesh.can_step and self._dispatch_step(mesh):
                    self._departures.depart()  # at once: behind the mesh's next step, a gather would wait for that too
            self._departures.depart()
        out = list(self._out)
        self._out.clear()
        return out

    def horizon(self, mesh: int) -> int:
        """Decode steps that this mesh may run in a row before a prompt, an arriving request or a finish by length
        would change its batch; 0: it has nothing to decode. Pages are not considered."""
        state = self.meshes[mesh]
        left = [r.max_tokens - r.dispatched for r in state.decoding.values() if r.can_decode]
        if not left or state.prefilling or any(r.handoff is not None for r in state.seated.values()):
            return min(1, len(left))
        return min(left)

    def _dispatch_step(self, mesh: MeshState) -> bool:
        """One step if there is work; a mesh that does both alternates, or does both at once."""
        ready = [request for request in mesh.decoding.values() if request.can_decode]
        prefills = bool(mesh.prefilling) and (mesh.spec.fused or not (ready and mesh.last_was_prefill))
        mesh.last_was_prefill = prefills
        steps = 1 if prefills else self._steps_at_once(mesh)
        rows = self._decode_rows(mesh, ready, steps) if mesh.spec.fused or not prefills else ()
        chunks = self._take_chunks(mesh, may_preempt=not rows) if prefills else ()
        if rows or chunks:
            self._out.append(self._step(mesh, chunks, rows, steps))
            mesh.in_flight.add(self._next_step)
            self._next_step += 1
            for chunk in chunks:
                if not chunk.is_last:
                    self._departures.pipeline(self.requests[chunk.request_id])
        return bool(rows or chunks)

    def _step(
        self, mesh: MeshState, chunks: tuple[Chunk, ...], rows: tuple[DecodeRow, ...], steps: int
    ) -> Prefill | Decode | Fused:
        step = self._next_step
        if not chunks:
            return Decode(mesh.index, step, bucket_for(len(rows), self.config.decode_buckets), steps, rows)
        bucket = bucket_for(sum(chunk.length for chunk in chunks), self.config.prefill_buckets)
        return Fused(mesh.index, step, bucket, chunks, rows) if rows else Prefill(mesh.index, step, bucket, chunks)

    def _steps_at_once(self, mesh: MeshState) -> int:
        """All that a dispatch may run, where nothing can interfere and pages for them are free anyway; else 1."""
        steps = self.config.decode_steps
        if steps == 1:
            return 1
        pages = len(mesh.decoding) * (self.config.pages_for(steps) + 1)
        has_pages = all(group.num_free >= pages for group in mesh.cache.groups)
        return steps if has_pages and self.horizon(mesh.index) >= steps else 1

    def _take_chunks(self, mesh: MeshState, *, may_preempt: bool) -> tuple[Chunk, ...]:
        """At most one chunk each, in order of arrival."""
        chunks: list[Chunk] = []
        budget = self.config.chunk_size
        for request in mesh.prefilling[: self.config.prefill_rows]:
            stop = request.to_prefill
            start = min(request.prefilled, stop - 1)
            length = self._chunk_length(start, stop, budget)
            if length == 0 or not self._place_chunk(request, mesh, start, length, may_preempt):
                break
            chunks.append(self._take_chunk(mesh, request, start, length))
            budget -= length
        return tuple(chunks)

    def _chunk_length(self, start: int, stop: int, budget: int) -> int:
        """How many of the tokens `start` to `stop` - 1 go into a step with room for `budget` more; 0: none.

        In deterministic mode chunks end at absolute multiples of the chunk size and are not cut to fit a step.
        """
        if not self.config.deterministic:
            return min(stop - start, budget)
        size = self.config.chunk_size
        length = min(stop, (start // size + 1) * size) - start
        return length if length <= budget else 0

    def _place_chunk(self, request: Request, mesh: MeshState, start: int, length: int, may_preempt: bool) -> bool:
        """Pages for a chunk; where that fails, those of later arrivals, if no row of the same step is theirs."""
        while request.home is not None:
            if mesh.cache.place_chunk(request.home, start, start + length):
                return True
            if not may_preempt:
                return False
            self._preempt(max(mesh.seated.values(), key=by_arrival))
        return False

    def _take_chunk(self, mesh: MeshState, request: Request, start: int, length: int) -> Chunk:
        """The request's next chunk; with its last one it leaves the line."""
        seat = request.home
        assert seat is not None
        if request.timeline.prefill_start is None:
            request.timeline.prefill_start = self._now
        chunk = Chunk(
            request.id, request.run, seat.slot, start, length, request.prefilled, start + length == request.to_prefill
        )
        request.prefilled = start + length
        self._remember_chunk(request, mesh, chunk)
        if chunk.is_last:
            mesh.prefilling.remove(request)
            self._end_prefill(request, mesh)
        return chunk

    def _remember_chunk(self, request: Request, mesh: MeshState, chunk: Chunk) -> None:
        assert request.home is not None
        mesh.cache.remember(request.home, request.hashes, request.prefilled)
        size = self.config.page_size
        for key in request.hashes[chunk.write_from // size : chunk.kv_len // size]:
            mesh.computing.pop(key, None)

    def _end_prefill(self, request: Request, mesh: MeshState) -> None:
        """Where a prompt goes once its last chunk is dispatched. One that only waits for its last token stays."""
        assert request.home is not None
        request.dispatched = request.to_prefill - request.prompt_len + 1
        mesh.cache.end_prompt(request.home)
        self._admission.fork_siblings(request, mesh)
        if request.dispatched == request.max_tokens:
            return
        if mesh.spec.decodes:
            request.move_to(State.DECODE)
            mesh.decoding[request.id] = request
        else:
            request.move_to(State.HANDOFF)
            self._departures.add(request)

    def _decode_rows(self, mesh: MeshState, ready: list[Request], steps: int) -> tuple[DecodeRow, ...]:
        """A row for everyone who has, or is given, the pages. The earliest arrival comes first."""
        rows = []
        for request in sorted(ready, key=by_arrival):
            position, seat = request.kv_len, request.home
            # Most often the pages are there, and nothing has to be asked.
            if seat is None or (position + steps > seat.writable and not self._make_room(request, mesh, steps)):
                continue
            is_forced = request.dispatched <= request.forced
            rows.append(DecodeRow(request.id, request.run, seat.slot, position + 1, is_forced))
        for row in rows:
            self.requests[row.request_id].dispatched += steps
        return tuple(rows)

    def _make_room(self, request: Request, mesh: MeshState, steps: int) -> bool:
        """Pages for the request's next tokens, if need be those of later arrivals; False: it was itself the last."""
        while request.home is not None and request.id in mesh.decoding:
            if mesh.cache.grow(request.home, request.kv_len, request.kv_len + steps):
                return True
            self._give_up_seat(max(mesh.seated.values(), key=by_arrival), mesh)
        return False

    def _give_up_seat(self, request: Request, mesh: MeshState) -> None:
        """Move to another mesh if one has room; give up a seat that nothing depends on yet; else start over."""
        if self._migrate(request, None):
            return
        if request.home is not None and request.home.mesh != mesh.index:
            self._departures.give_credit_back(request)
        else:
            self._preempt(request)

    def _migrate(self, request: Request, destination: int | None) -> bool:
        if request.state is not State.DECODE or not self._departures.migrate(request, destination):
            return False
        self.tally.migrations += 1
        request.move_to(State.HANDOFF)
        return True

    def check_integrity(self) -> None:
        """Raise if a page or slot is lost or doubled, or if anyone but a request that is here holds one."""
        for mesh in self.meshes:
            seats = {
                request.id: seat
                for request in self.requests.values()
                for seat in (request.home, None if request.handoff is None else request.handoff.seat)
                if seat is not None and seat.mesh == mesh.index
            }
            mesh.cache.check(seats)
            if set(mesh.seated) != set(seats) or not set(mesh.decoding) <= set(seats):
                raise RuntimeError(f"mesh {mesh.index}: seats of {set(seats)}, listed {set(mesh.seated)}")
        self._departures.check()
