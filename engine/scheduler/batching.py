"""Which rows a mesh's next step holds: prompt chunks, decode rows or, on a fused mesh, both.

Invariants: requests take part in the policy's order; a row or chunk is given out only with its pages in place, if need
be those of requests further back; a victim never has a row in the step that is being put together.
"""

from collections.abc import Sequence

from ..config import bucket_for
from ..protocol.actions import Chunk, Decode, DecodeRow, Fused, Prefill
from .admission import Admission
from .batch_allowance import BatchAllowance
from .handoffs import Handoffs
from .lifecycle import Lifecycle
from .mesh_state import MAX_STEPS_IN_FLIGHT, MeshState, SharedState
from .request import Request, State


class Batching:
    """The choice of what the next step of each mesh holds."""

    def __init__(self, shared: SharedState, admission: Admission, handoffs: Handoffs, lifecycle: Lifecycle):
        """Begin without steps."""
        self._admission, self._handoffs, self._lifecycle = admission, handoffs, lifecycle
        self._config, self._requests = shared.config, shared.requests
        self._costs, self._emit = shared.costs, shared.emit
        self._allowance = BatchAllowance(shared)
        self._next_step = 0

    def dispatch_step(self, mesh: MeshState, now: float) -> bool:
        """Dispatch one step, if the mesh may run ahead and there is work; return whether it did.

        A mesh that prefills and decodes alternates between the two, or does both in one step (`fused`).
        """
        if len(mesh.in_flight) >= MAX_STEPS_IN_FLIGHT:
            return False
        ready: Sequence[Request] = mesh.ready()
        prefilling: Sequence[Request] = mesh.prefilling()
        budget, mesh.holds_back = self._config.chunk_size, False
        if mesh.batch and mesh.shared.interactive.is_about(now):
            found = len(prefilling) + len(ready)
            prefilling, ready, budget = self._allowance.allowed(mesh, prefilling, ready)
            mesh.holds_back = len(prefilling) + len(ready) < found
        if mesh.constrained and _would_split(mesh, ready):
            ready, mesh.holds_back = (), True
            if not prefilling:
                return False
        prefills = bool(prefilling) and (mesh.spec.fused or not (ready and mesh.last_was_prefill))
        mesh.last_was_prefill = prefills
        steps = 1 if prefills else self._steps_at_once(mesh)
        rows = self._decode_rows(mesh, ready, steps) if mesh.spec.fused or not prefills else ()
        if rows and prefills:  # making rows may have preempted some of them
            prefilling = [request for request in prefilling if request.state is State.PREFILL]
        chunks = self._take_chunks(mesh, prefilling, budget, now, may_preempt=not rows) if prefills else ()
        if rows or chunks:
            step = self._step(mesh, chunks, rows, steps)
            self._costs.begin_step(step)
            self._emit(step)
            if mesh.batch:
                self._allowance.began(mesh.index, step.step, chunks, rows)
            for chunk in chunks:
                if not chunk.is_last:
                    self._handoffs.pipeline(self._requests[chunk.request_id])
        return bool(rows or chunks)

    def ended(self, mesh: MeshState, step: int, seconds: float) -> None:
        """Take in that a step was read, which took so long."""
        self._allowance.ended(mesh.index, step, seconds)

    def forget(self, mesh: MeshState) -> None:
        """Take in that the steps in flight on a mesh are lost."""
        self._allowance.forget(mesh.index)

    def _horizon(self, mesh: MeshState) -> int:
        """Count the decode steps that a mesh may run in a row before its batch would change; 0: it decodes nothing.

        A prompt, an arriving request or an end by length changes a batch. Pages are not considered.
        """
        left = [request.max_tokens - request.dispatched for request in mesh.ready()]
        if not left or mesh.prefilling() or any(request.handoff is not None for request in mesh.placed):
            return min(1, len(left))
        return min(left)

    def _step(
        self, mesh: MeshState, chunks: tuple[Chunk, ...], rows: tuple[DecodeRow, ...], steps: int
    ) -> Prefill | Decode | Fused:
        step, self._next_step = self._next_step, self._next_step + 1
        mesh.in_flight.add(step)
        if not chunks:
            return Decode(mesh.index, step, bucket_for(len(rows), self._config.decode_buckets), steps, rows)
        bucket = bucket_for(sum(chunk.length for chunk in chunks), self._config.prefill_buckets)
        return Fused(mesh.index, step, bucket, chunks, rows) if rows else Prefill(mesh.index, step, bucket, chunks)

    # ---- prompt chunks

    def _take_chunks(
        self, mesh: MeshState, prefilling: Sequence[Request], budget: int, now: float, *, may_preempt: bool
    ) -> tuple[Chunk, ...]:
        """Take at most one chunk of each request, in order, as far as `budget` tokens go."""
        chunks: list[Chunk] = []
        for request in prefilling[: self._config.prefill_rows]:
            stop = request.to_prefill
            start = min(request.prefilled, stop - 1)
            length = self._chunk_length(start, stop, budget)
            if length == 0 or not self._place_chunk(request, mesh, start, length, may_preempt):
                break
            chunks.append(self._take_chunk(mesh, request, start, length, now))
            budget -= length
        return tuple(chunks)

    def _chunk_length(self, start: int, stop: int, budget: int) -> int:
        """Count the tokens of `start` to `stop` - 1 that go into a step with room for `budget` more; 0: none.

        In deterministic mode chunks end at absolute multiples of the chunk size and are not cut to fit a step.
        """
        if not self._config.deterministic:
            return min(stop - start, budget)
        size = self._config.chunk_size
        length = min(stop, (start // size + 1) * size) - start
        return length if length <= budget else 0

    def _place_chunk(self, request: Request, mesh: MeshState, start: int, length: int, may_preempt: bool) -> bool:
        """Put pages for a chunk in place; return False if there are too few, or the request has lost its own.

        With `may_preempt` requests give up their pages if need be: none of them may have a row in the same step.
        """
        while request.placement is not None:
            if mesh.pages.place_chunk(request.placement, start, start + length):
                return True
            if not may_preempt:
                return False
            self._lifecycle.make_way(request, mesh, may_move=False)
        return False

    def _take_chunk(self, mesh: MeshState, request: Request, start: int, length: int, now: float) -> Chunk:
        """Take the request's next chunk; with its last one the prompt is done."""
        placement = request.placement
        assert placement is not None
        if request.timeline.prefill_start is None:
            request.timeline.prefill_start = now
        write_from, request.prefilled = request.prefilled, start + length
        request.begun += length
        mesh.begun += length
        is_last = request.prefilled == request.to_prefill
        mesh.pages.remember(placement, request.hashes, request.prefilled)
        size = self._config.page_size
        computed = request.hashes[write_from // size : request.prefilled // size]
        mesh.computing.end(computed)
        self._admission.wake(computed)
        if is_last:
            self._end_prefill(request, mesh)
        return Chunk(request.id, request.run, placement.slot, start, length, write_from, is_last)

    def _end_prefill(self, request: Request, mesh: MeshState) -> None:
        """Move a request to DECODE or HANDOFF after its last chunk, unless it only waits for its last token."""
        assert request.placement is not None
        request.dispatched = request.to_prefill - request.prompt_len + 1
        mesh.pages.end_prompt(request.placement)
        self._admission.place_siblings(request, mesh)
        if request.dispatched == request.max_tokens:
            return
        if mesh.decodes and request.handoff is None:  # of a mesh that has gained decode, parts may be on their way
            request.move_to(State.DECODE)
        else:
            self._handoffs.begin(request)
        self._admission.wake((request.id,))

    # ---- decode rows

    def _steps_at_once(self, mesh: MeshState) -> int:
        """Return how many decode steps to dispatch at once.

        It is `decode_steps` where nothing can interfere and the pages for all of them are free, else 1; a constrained
        request interferes, because its next token has to be read before another step of it.
        """
        steps = self._config.decode_steps
        if steps == 1 or mesh.constrained:
            return 1
        decoding = [request for request in mesh.placed if request.state is State.DECODE]
        pages = len(decoding) * (self._config.pages_for(steps) + 1)
        has_pages = all(group.num_free >= pages for group in mesh.pages.groups)
        return steps if has_pages and self._horizon(mesh) >= steps else 1

    def _decode_rows(self, mesh: MeshState, ready: Sequence[Request], steps: int) -> tuple[DecodeRow, ...]:
        """Make a row for every request of `ready`, which is in order, that has or gets the pages for `steps` steps."""
        rows = []
        for request in ready:
            placement, dispatched = request.placement, request.dispatched
            kv_len = request.prompt_len + dispatched  # with the token that is fed
            # Most often the pages are there, and nothing has to be asked.
            if placement is None or (
                kv_len + steps > placement.writable + 1 and not self._make_room(request, mesh, steps)
            ):
                continue
            rows.append(DecodeRow(request.id, request.run, placement.slot, kv_len, dispatched <= request.forced))
            request.dispatched = dispatched + steps
        return tuple(rows)

    def _make_room(self, request: Request, mesh: MeshState, steps: int) -> bool:
        """Put pages for the request's next tokens in place; return False if it has lost its own instead.

        If need be, a request after it gives up its pages, or the request itself does.
        """
        while request.placement is not None and request.state is State.DECODE:
            if mesh.pages.grow(request.placement, request.kv_len, request.kv_len + steps):
                return True
            self._lifecycle.make_way(request, mesh, may_move=True)
        return False


def _would_split(mesh: MeshState, ready: Sequence[Request]) -> bool:
    """Return whether a decode step of these alone would part constrained requests that could take their steps together:
    others of them are in a step that was not read, and no request that runs ahead needs one now.

    Two parts would take turns for good, each at the price of a whole step.
    """
    if not mesh.in_flight or not all(request.is_constrained for request in ready):
        return False
    return any(request.is_constrained and request.has_row_ahead for request in mesh.placed)
