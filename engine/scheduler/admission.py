"""The queue of waiting requests: who is seated where, and when.

First come, first served; a request that starts over keeps its place by arrival. A prompt goes where the least is left
to compute before its first token, cached pages counted; one that shares a prompt, or blocks of one, that is being
computed waits for that instead of computing it too. Control-plane module: no JAX here.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from functools import partial

from ..config import EngineConfig
from ..metrics.counters import Tally
from .mesh_state import MeshState
from .request import Request, State, by_arrival
from .router import prefill_rank


class Admission:
    """Requests in WAITING; seating one moves it to PREFILL. `is_held`: only those that start over are admitted."""

    def __init__(
        self, config: EngineConfig, meshes: Sequence[MeshState], requests: Mapping[int, Request], tally: Tally
    ):
        """`requests`: all that have not ended, by name; the scheduler's own."""
        self._config, self._meshes, self._requests, self._tally = config, meshes, requests, tally
        self._waiting: list[Request] = []
        self._siblings: dict[int, list[Request]] = {}
        self.is_held = False

    def add(self, request: Request) -> None:
        """Take a request into the queue."""
        insort(self._waiting, request, key=by_arrival)
        if request.facts.fork_of is not None and not request.restarts:
            self._siblings.setdefault(request.facts.fork_of, []).append(request)

    def remove(self, request: Request) -> None:
        """Take it out again."""
        del self._waiting[bisect_left(self._waiting, request.number, key=by_arrival)]
        leader = request.facts.fork_of
        if leader is not None and request in (siblings := self._siblings.get(leader, [])):
            siblings.remove(request)
            if not siblings:
                del self._siblings[leader]

    def admit(self) -> None:
        """First come, first served: a prompt that does not fit yet holds back those behind it.

        One whose next block is being computed for another is passed over until that is done.
        """
        for request in self._waiting[: 2 * self._config.max_num_seqs]:
            if request.state is not State.WAITING:  # seated meanwhile, with the request that it forks
                continue
            if (self.is_held and not request.restarts) or self._is_coming(request):
                continue
            if not self._seat(request):
                return

    def fork_siblings(self, leader: Request, mesh: MeshState) -> None:
        """Seat those who share the whole prompt on its very pages. Each computes the last token for itself."""
        assert leader.home is not None
        if leader.restarts or self.is_held:
            return
        for request in list(self._siblings.get(leader.id, ())):
            seat = mesh.cache.fork(request.id, leader.home)
            if seat is None:
                return
            request.home = seat
            self._begin_prefill(request, mesh, request.prompt_len)

    def _is_coming(self, request: Request) -> bool:
        """Whether another request is computing what this one lacks wherever it could go."""
        fork_of = request.facts.fork_of
        leader = None if fork_of is None else self._requests.get(fork_of)
        if leader is not None and not request.restarts and leader.state in (State.WAITING, State.PREFILL):
            return True
        if request.awaits is not None and self._is_computed(request.awaits):
            return True
        request.awaits = None
        if any(mesh.computing for mesh in self._meshes):
            done = max(m.cache.hit(request.hashes, request.to_prefill) for m in self._meshes if m.spec.prefills)
            first = done // self._config.page_size
            request.awaits = next(filter(self._is_computed, request.hashes[first : first + 1]), None)
        return request.awaits is not None

    def _is_computed(self, block_hash: bytes) -> bool:
        return any(block_hash in mesh.computing for mesh in self._meshes)

    def _seat(self, request: Request) -> bool:
        """Seat a prompt where the least is to be done before its first token."""

        able = [m for m in self._meshes if m.spec.prefills and m.cache.slots.num_free and not m.is_backed_up]
        for mesh in sorted(able, key=partial(prefill_rank, request)):
            seated = mesh.cache.seat_prompt(request.id, request.hashes, request.to_prefill, mesh.watermark)
            if seated is not None:
                request.home, cached = seated
                self._begin_prefill(request, mesh, cached)
                return True
        return False

    def _begin_prefill(self, request: Request, mesh: MeshState, cached: int) -> None:
        self._waiting.remove(request)
        request.move_to(State.PREFILL)
        request.prefilled = cached
        to_compute = max(1, request.to_prefill - cached)
        if request.cached is None:
            request.cached = request.prompt_len - to_compute
            self._tally.prompt_tokens += request.prompt_len
            self._tally.cached_tokens += request.cached
        mesh.seated[request.id] = request
        mesh.unanswered[request.id] = to_compute
        insort(mesh.prefilling, request, key=by_arrival)
        for key in request.hashes[cached // self._config.page_size : request.to_prefill // self._config.page_size]:
            mesh.computing.setdefault(key, request)
