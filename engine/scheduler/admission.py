"""The queue: which waiting requests are placed on a prefill mesh, and when.

Requests wait in the policy's order, and one that starts over keeps its place in it. A prompt goes where the policy
ranks first; one that shares a prompt, or blocks of one, with another that is being computed sleeps instead of computing
it too, and costs nothing until it is woken.

Invariant: a request sleeps only as long as what it sleeps for is under way: the block that it awaits is being computed
by a placement that is there, or the request that it forks waits or is being prefilled. What ends that wakes it.
"""

from collections.abc import Iterable

from .cache_reports import CacheReports
from .mesh_state import MeshState, SharedState, in_order
from .priority_inheritance import PriorityInheritance
from .request import Awaited, Request, State
from .router import Router
from .waiting import WaitingRequests


class Admission:
    """The queue of requests in WAITING; placing one moves it to PREFILL."""

    def __init__(self, shared: SharedState, router: Router, inheritance: PriorityInheritance):
        self._shared, self._router, self._inheritance = shared, router, inheritance
        self._config, self._requests, self._counters = shared.config, shared.requests, shared.counters
        self._reports, self._waiting = CacheReports(shared), WaitingRequests(self._config.page_size)
        self._refusal = shared.room.refusal()  # of the first that found no room
        self._passed = -1, -1  # how much had changed and been freed when nothing behind it was found to fit either
        self._now = 0.0
        self._found = 0, b""  # the last block found to be computed for another, and how many come before it
        self.first_refused: Request | None = None  # the first of the queue, if it found no room
        self.seated: list[int] = []  # those that were given their first seat in this decision
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

    @property
    def waiting(self) -> WaitingRequests:
        """Return the queue, to be looked at."""
        return self._waiting

    def put_back(self, request: Request) -> None:
        """Add a request that was removed, at what is now its place in the order."""
        self._waiting.add(request)

    def wake(self, done: Iterable[Awaited]) -> None:
        """Have the requests asked again that sleep for one of these: blocks that a placement has computed or never
        will, or ids of requests that can be forked now or never will be."""
        done = list(done)
        self._inheritance.repay("computing", done)
        self._waiting.done(done)

    def admit(self, now: float) -> None:
        """Place prompts in order.

        One whose next block is being computed for another is passed over, and sleeps until that is done. A prompt that
        does not fit yet is passed over by those that do until it has waited `age_seconds`; then it holds back those
        behind it.
        """
        self._now, self.first_refused = now, None
        if self.is_held:
            self._admit_restarted()
            return
        while (request := self._waiting.first(self._sleeps_on)) is not None:
            if (self._refusal.holds(request) or not self._admit(request)) and not self._pass_over(request):
                self.first_refused = request
                return

    def _pass_over(self, first: Request) -> bool:
        """Place the next that surely fits in place of the first, which does not; False: none may, or fits."""
        if self._is_kept_for(first) or self._passed == (self._waiting.changes, self._shared.room.freed):
            return False
        request = self._next_that_fits()
        if request is None or request is first or not self._admit(request, may_refuse=False):
            self._passed = self._waiting.changes, self._shared.room.freed
            return False
        return True

    def _next_that_fits(self) -> Request | None:
        """Find the next that surely fits somewhere; what has changed on the meshes is looked at only if one may."""
        for most in (self._router.most_pages, self._router.longest_prompt):
            pages = most()
            request = self._waiting.first_that_fits(pages, self._is_kept_for, self._sleeps_on) if pages else None
            if request is None:
                return None
        return request

    def _is_kept_for(self, request: Request) -> bool:
        """Return whether freed pages are kept for a request, should it find no room."""
        return self._now - request.accepted >= self._config.age_seconds

    def _admit_restarted(self) -> None:
        for request in self._waiting.restarted():
            is_asleep = request.sleeps_for is not None and self._is_under_way(request.sleeps_for)
            if not is_asleep and not self._admit(request):
                return

    def _admit(self, request: Request, *, may_refuse: bool = True) -> bool:
        """Place a prompt, or let it sleep; False: it finds no room, which is noted if it `may_refuse`."""
        fork_of = request.facts.fork_of
        if fork_of is not None and not request.restarts and self._is_under_way(fork_of):
            self._waiting.sleep(request, fork_of, len(request.hashes))
        elif (blocks := self._blocks_before_one_computed(request)) is not None:
            self._waiting.sleep(request, request.hashes[blocks], blocks + 1)
            self._inheritance.lend("computing", request.hashes[blocks], request.order)
        elif not self._place(request):
            self._waiting.rouse(request)
            if may_refuse:
                self._refusal.note(request, request.hashes)
            return False
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

    def _blocks_before_one_computed(self, request: Request) -> int | None:
        """Count the first blocks of the prompt that are cached, if the next one is being computed for another."""
        computing, hashes = self._shared.computing, request.hashes
        if not computing or not hashes:
            return None
        blocks, block = self._found  # prompts that begin alike are asked for one after the other
        if blocks < len(hashes) and hashes[blocks] == block in computing and not self._shared.index.meshes(block):
            return blocks
        blocks = self._router.blocks_cached(request)
        if blocks >= len(hashes) or hashes[blocks] not in computing:
            return None
        self._found = blocks, hashes[blocks]
        return blocks

    def _sleeps_on(self, awaited: Awaited) -> bool:
        """Return whether those that sleep for something go on to: another is to bring it, at their urgency."""
        is_under_way = self._is_under_way(awaited)
        if is_under_way and isinstance(awaited, bytes):
            self._inheritance.lend("computing", awaited, self._waiting.urgency(awaited))
        return is_under_way

    def _is_under_way(self, awaited: Awaited) -> bool:
        if isinstance(awaited, bytes):
            return awaited in self._shared.computing
        leader = self._requests.get(awaited)
        return leader is not None and leader.state in (State.WAITING, State.PREFILL)

    def _place(self, request: Request) -> bool:
        """Place a prompt on the best mesh that has room; False: none has."""
        for mesh in self._router.for_prompt(request):
            placed = mesh.pages.place_prompt(request.id, request.hashes, request.to_prefill, mesh.watermark)
            if placed is not None:
                self._waiting.remove(request)
                request.placement, cached = placed
                self._begin_prefill(request, mesh, cached)
                self._router.chosen(request, "prefill", mesh)
                self._counters.conditional_prefills += not mesh.prefills
                return True
        return False

    def _begin_prefill(self, request: Request, mesh: MeshState, cached: int) -> None:
        assert request.placement is not None
        request.move_to(State.PREFILL)
        request.prefilled, request.prefilled_on = cached, mesh.index
        request.unanswered = max(1, request.to_prefill - cached)
        mesh.change_load(request.unanswered, is_batch=request.is_batch)
        if not request.restarts:
            self.seated.append(request.id)
        if request.cache is None:
            request.cache = self._reports.report(request, mesh.index)
            self._counters.count_prompt(request.prompt_len, request.cache)
        mesh.add(request)
        size = self._config.page_size
        mesh.computing.expect(request.hashes[cached // size : request.to_prefill // size], request.placement)
        self._refusal.has_news(request.hashes, cached // size)  # it may sleep for these, and hold back nobody

    def check(self) -> None:
        """Raise if a request sleeps for something that is not under way, and will not be asked again."""
        self._waiting.check(self._is_under_way)
