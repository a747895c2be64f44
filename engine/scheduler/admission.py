"""The queue: which waiting requests are placed on a prefill mesh, and when.

Requests wait in the policy's order, and one that starts over keeps its place in it. A prompt goes where the policy
ranks first; one that shares a prompt, or blocks of one, with another that is being computed waits for that instead of
computing it too.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

from ..config import EngineConfig
from ..metrics.counters import Counters
from .mesh_state import MeshState, in_order, sorted_requests
from .policy import Policy
from .request import Request, State


class Admission:
    """The queue of requests in WAITING; placing one moves it to PREFILL."""

    def __init__(
        self,
        config: EngineConfig,
        meshes: Sequence[MeshState],
        requests: Mapping[int, Request],
        policy: Policy,
        counters: Counters,
    ):
        self._config, self._meshes, self._requests = config, meshes, requests
        self._policy, self._counters = policy, counters
        self._waiting = sorted_requests()
        self.is_held = False  # only those that start over are admitted

    def add(self, request: Request) -> None:
        """Add a request to the queue."""
        self._waiting.add(request)
        leader = self._leader(request)
        if leader is not None:
            leader.siblings.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request from the queue."""
        self._waiting.remove(request)

    def admit(self) -> None:
        """Place prompts in order; a prompt that does not fit yet holds back those behind it.

        A prompt whose next block is being computed for another request is passed over until that is done.
        """
        for request in self._next():
            # It may have been placed meanwhile, with the request that it forks.
            if request.state is State.WAITING and not self._is_coming(request) and not self._place(request):
                return

    def place_siblings(self, leader: Request, mesh: MeshState) -> None:
        """Place the requests that fork `leader` on its pages; each computes the prompt's last token for itself."""
        assert leader.placement is not None
        if leader.restarts or self.is_held:
            return
        for request in sorted(leader.siblings, key=in_order):
            if request.state is not State.WAITING:
                continue
            placement = mesh.pages.fork(request.id, leader.placement)
            if placement is None:
                return
            request.placement = placement
            self._begin_prefill(request, mesh, request.prompt_len)

    def _next(self) -> list[Request]:
        """List the requests that may be admitted, in order: two for each slot at most."""
        if not self._waiting:
            return []
        able = (request for request in self._waiting if request.restarts or not self.is_held)
        return list(islice(able, 2 * self._config.max_num_seqs))

    def _leader(self, request: Request) -> Request | None:
        """Find the request whose prompt this one forks; None: there is none, or it has to be computed anyway."""
        fork_of = request.facts.fork_of
        return None if fork_of is None or request.restarts else self._requests.get(fork_of)

    def _is_coming(self, request: Request) -> bool:
        """Return whether another request is computing the block that this one lacks on every mesh where it could go."""
        leader = self._leader(request)
        if leader is not None and leader.state in (State.WAITING, State.PREFILL):
            return True
        if request.awaits is not None and self._is_computed(request.awaits):
            return True
        request.awaits = None
        if any(mesh.computing for mesh in self._meshes):
            done = max(m.pages.hit(request.hashes, request.to_prefill) for m in self._meshes if m.prefills)
            first = done // self._config.page_size
            request.awaits = next(filter(self._is_computed, request.hashes[first : first + 1]), None)
        return request.awaits is not None

    def _is_computed(self, block_hash: bytes) -> bool:
        return any(block_hash in mesh.computing for mesh in self._meshes)

    def _place(self, request: Request) -> bool:
        """Place a prompt on the best mesh that has room; return False if none has."""
        able = [m for m in self._meshes if m.prefills and m.pages.slots.num_free and not m.is_backed_up]
        for mesh in sorted(able, key=partial(self._policy.prefill_rank, request)):
            placed = mesh.pages.place_prompt(request.id, request.hashes, request.to_prefill, mesh.watermark)
            if placed is not None:
                request.placement, cached = placed
                self._begin_prefill(request, mesh, cached)
                return True
        return False

    def _begin_prefill(self, request: Request, mesh: MeshState, cached: int) -> None:
        assert request.placement is not None
        self._waiting.remove(request)
        request.move_to(State.PREFILL)
        request.prefilled, request.prefilled_on = cached, mesh.index
        request.unanswered = max(1, request.to_prefill - cached)
        mesh.prefill_load += request.unanswered
        if request.cached is None:
            request.cached = request.prompt_len - request.unanswered
            self._counters.prompt_tokens += request.prompt_len
            self._counters.cached_tokens += request.cached
        mesh.placed.add(request)
        size = self._config.page_size
        mesh.expect(mesh.computing, request.hashes[cached // size : request.to_prefill // size], request.placement)
