"""The queue: which waiting requests are placed on a prefill mesh, and when.

Requests wait in the policy's order, and one that starts over keeps its place in it. A prompt goes where the policy
ranks first; one that shares a prompt, or blocks of one, with another that is being computed sleeps instead of computing
it too, and costs nothing until it is woken.

Invariant: a request sleeps only as long as what it sleeps for is under way: the block that it awaits is being computed
by a placement that is there, or the request that it forks waits or is being prefilled. What ends that wakes it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

from ..config import EngineConfig
from ..metrics.counters import Counters
from .mesh_state import MeshState, in_order
from .policy import Policy
from .request import Request, State
from .waiting import Awaited, Group, WaitingRequests

# The next block that a chain lacks, where it stands, and that it is being computed, by the chain's first block.
type _Found = dict[bytes, tuple[int, bytes]]


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
        self._waiting = WaitingRequests()
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

    def wake(self, done: Iterable[Awaited]) -> None:
        """Have the requests asked again that sleep for one of these: blocks that a placement was computing and has
        computed or never will, or ids of requests that can be forked now or never will be."""
        self._waiting.done(done)

    def admit(self) -> None:
        """Place prompts in order; a prompt that does not fit yet holds back those behind it.

        One whose next block is being computed for another is passed over, and sleeps until that is done.
        """
        groups = self._waiting.groups_done(self._is_under_way)
        if self._all_sleep_on(groups):
            return
        placed: dict[Request, None] = {}
        asleep: dict[Request, Awaited] = {}
        refused: Request | None = None
        found: _Found = {}
        able: list[MeshState] | None = None  # asked once: placing a prompt does not change it
        for request in self._able(groups.values()):
            awaited = self._find_awaited(request, found)
            if awaited is not None:
                asleep[request] = awaited
                continue
            if able is None:
                able = [mesh for mesh in self._meshes if mesh.prefills and not mesh.is_backed_up]
            if not self._place(request, able):
                refused = request
                break
            placed[request] = None
            found.clear()
        self._waiting.apply(placed, asleep, refused)

    def _able(self, groups: Collection[Group]) -> list[Request]:
        """List those of the first that may be admitted and do not sleep."""
        most = 2 * self._config.max_num_seqs
        return self._waiting.first_restarted(most, groups) if self.is_held else self._waiting.first(most, groups)

    def _all_sleep_on(self, groups: Mapping[Awaited, Group]) -> bool:
        """Where only groups are to be asked, let each sleep for its next block, if it is the same for all in it and
        being computed. What takes a pass over thousands of requests to find is found for a few."""
        if not groups or self.is_held or not self._waiting.only(groups.values(), 2 * self._config.max_num_seqs):
            return not groups and not self._waiting.has_awake
        found: _Found = {}
        nexts: dict[Awaited, bytes] = {}
        for key, group in groups.items():
            first = next(iter(group))
            block = self._next_computed(first, found) if isinstance(key, bytes) else None
            if block is None:
                return False
            index, _ = found[first.hashes[0]]
            if not all([index < len(other.hashes) and other.hashes[index] == block for other in group]):
                return False
            nexts[key] = block
        for key, block in nexts.items():
            self._waiting.sleep_on(key, block)
        return True

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
            self._waiting.remove(request)
            self._begin_prefill(request, mesh, request.prompt_len)

    def _leader(self, request: Request) -> Request | None:
        """Find the request whose prompt this one forks; None: there is none, or it has to be computed anyway."""
        fork_of = request.facts.fork_of
        return None if fork_of is None or request.restarts else self._requests.get(fork_of)

    def _find_awaited(self, request: Request, found: _Found) -> Awaited | None:
        """Find what another request is computing that this one lacks wherever it could go: the block that it awaited
        before, the first one of its prompt that no mesh has, or the id of the request that it forks."""
        fork_of = request.facts.fork_of
        if fork_of is not None and not request.restarts and self._is_under_way(fork_of):
            return fork_of
        if request.awaits is None or not self._is_computed(request.awaits):
            request.awaits = self._next_computed(request, found)
        return request.awaits

    def _next_computed(self, request: Request, found: _Found) -> bytes | None:
        """Find the first block of the prompt that no mesh has, if it is being computed.

        Prompts that have this block in common have all before it in common too: one is looked up for all of them.
        """
        hashes = request.hashes
        if not hashes:
            return None
        index, block = found.get(hashes[0], (0, b""))
        if index < len(hashes) and hashes[index] == block:
            return block
        if not any([mesh.computing for mesh in self._meshes]):
            return None
        cached = max([mesh.pages.hit(hashes, request.to_prefill) for mesh in self._meshes if mesh.prefills])
        index = cached // self._config.page_size
        if index >= len(hashes) or not self._is_computed(hashes[index]):
            return None
        found[hashes[0]] = index, hashes[index]
        return hashes[index]

    def _is_under_way(self, awaited: Awaited) -> bool:
        if isinstance(awaited, bytes):
            return self._is_computed(awaited)
        leader = self._requests.get(awaited)
        return leader is not None and leader.state in (State.WAITING, State.PREFILL)

    def _is_computed(self, block_hash: bytes) -> bool:
        return any([block_hash in mesh.computing for mesh in self._meshes])

    def _place(self, request: Request, meshes: Sequence[MeshState]) -> bool:
        """Place a prompt on the best of these meshes that has room; False: none has."""
        able = [mesh for mesh in meshes if mesh.pages.slots.num_free]
        if len(able) > 1:
            able.sort(key=partial(self._policy.prefill_rank, request))
        for mesh in able:
            placed = mesh.pages.place_prompt(request.id, request.hashes, request.to_prefill, mesh.watermark)
            if placed is not None:
                request.placement, cached = placed
                self._begin_prefill(request, mesh, cached)
                return True
        return False

    def _begin_prefill(self, request: Request, mesh: MeshState, cached: int) -> None:
        assert request.placement is not None
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

    def check(self) -> None:
        """Raise if a request sleeps for something that is not under way, and will not be asked again."""
        self._waiting.check(self._is_under_way)
