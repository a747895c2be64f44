"""Meshes of a pool that have work left of a phase that is no longer theirs: what becomes of it.

Nothing new comes. Prompts of which nothing was computed are routed again, those begun are finished. Requests that wait
for credit where decoding has come to stay there; credit held at a mesh that stops decoding, with nothing sent, is given
back. What decodes finishes there or migrates, whichever rids the mesh of it sooner by the measured costs: decided
once a request, the longest first. Whatever was preempted or lost is gone as well, so a mesh that failed has drained.

Invariants: a mesh is in `meshes` exactly while it has a phase to drain; at most `MOST_LEAVING` requests are on their
way from it; a drain moves a request once in a flip. A request that found no room is tried again when room has come.
Which meshes drain is decided in `roles.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ..paging.block_table import Placement
from .handoffs import Handoffs
from .lifecycle import Lifecycle
from .mesh_state import MeshState, SharedState
from .notes import DrainChoice
from .request import Request, State
from .router import Router

# As many leave a mesh at a time: more would share its links, and take decode pages elsewhere long before they arrive.
MOST_LEAVING = 2
_MOST_TRIED = 8  # meshes, for room that has come
_MOST_NAMED = 5  # requests, in a message


@dataclass(eq=False)
class Drain:
    """What was decided of the requests that decode on one mesh."""

    moves: dict[int, bool] = field(default_factory=dict)  # id -> whether it is to move; the others finish there
    leaving: dict[int, int] = field(default_factory=dict)  # of those on their way: id -> run
    was_refused: bool = False  # the one that was to leave next found no room


class Drains:
    """The drains of one engine."""

    def __init__(self, shared: SharedState, router: Router, handoffs: Handoffs, lifecycle: Lifecycle):
        """Begin without drains."""
        self._shared, self._all, self._requests = shared, shared.meshes, shared.requests
        self._router, self._handoffs, self._lifecycle = router, handoffs, lifecycle
        self.meshes: dict[int, Drain] = {}
        self._refused: dict[int, None] = {}  # meshes with a request that found no room, the longest refused first
        self._room = (0, 0)  # how often room had come when one was refused last
        self._moved: set[int] = set()  # requests that were moved in this flip

    def new_flip(self) -> None:
        """Let requests be moved again that were moved before."""
        self._moved.clear()

    def begin(self, mesh: MeshState) -> None:
        """Have a mesh that has just taken its role be rid of what is not of this role."""
        self._end(mesh.index)
        self._end_waits(mesh)
        if not (mesh.prefills and mesh.decodes):
            mesh.drain("decode" if mesh.prefills else "prefill")
            self.meshes[mesh.index] = Drain()

    def look(self, due: Iterable[int]) -> None:
        """Go on with the drains of these meshes, where something has happened, and with those that wait for room."""
        for index in due:
            drain = self.meshes.get(index)
            if drain is not None:
                self._go_on(self._all[index], drain)
        while self._refused and self._room != (room := self._room_now):
            self._room = room
            for index in list(islice(self._refused, _MOST_TRIED)):  # the next may fit where the first does not
                self._go_on(self._all[index], self.meshes[index])
                if index in self._refused:
                    self._refused[index] = self._refused.pop(index)

    @property
    def _room_now(self) -> tuple[int, int]:
        return self._shared.room.freed, self._handoffs.staging.given_back

    # ---- at once

    def _end_waits(self, mesh: MeshState) -> None:
        """End what need not go on under the mesh's new role."""
        for request in list(mesh.placed):
            is_here, handoff = _is_here(request, mesh), request.handoff
            if is_here and mesh.decodes and (handoff is None or not handoff.has_sent):
                if request.state is State.HANDOFF or handoff is not None:
                    self._handoffs.settle_here(request)
            elif not is_here and not mesh.decodes and handoff is not None and not handoff.has_sent:
                self._handoffs.release_credit(request)
            if is_here and not mesh.prefills and request.state is State.PREFILL:
                if request.has_begun:
                    self._lifecycle.end_wait_for(request)
                else:
                    self._lifecycle.route_again(request)

    # ---- in time

    def _go_on(self, mesh: MeshState, drain: Drain) -> None:
        """Move what is to leave, as far as it may; end the drain if nothing is left."""
        left = list(self._left(mesh))
        if not left:
            self._end(mesh.index)
            mesh.drain(None)
        elif mesh.draining == "decode":
            self._move(mesh, drain, [request for request in left if request.state is State.DECODE])

    def _left(self, mesh: MeshState) -> Iterator[Request]:
        """Yield the requests that hold the mesh in the phase that it drains: those that have come and are coming."""
        if mesh.draining == "prefill":
            states = (State.PREFILL, State.HANDOFF)
            return (request for request in mesh.placed if _is_here(request, mesh) and request.state in states)
        return (request for request in mesh.placed if not _is_here(request, mesh) or request.state is State.DECODE)

    def _move(self, mesh: MeshState, drain: Drain, decoding: Sequence[Request]) -> None:
        """Send requests away that are better moved than finished, the longest first."""
        drain.leaving = {id_: run for id_, run in drain.leaving.items() if self._is_on_its_way(id_, run)}
        self._refused.pop(mesh.index, None)
        if len(drain.leaving) >= MOST_LEAVING:
            return
        candidates = [r for r in decoding if drain.moves.get(r.id, True) and r.id not in self._moved]
        if not candidates:
            return
        candidates.sort(key=lambda request: (-self._remaining(request), request.order))
        there = self._router.for_decoding(candidates[0], candidates[0].kv_len, mesh.index, None)
        for request in candidates:
            if there and request.id not in drain.moves:
                self._decide(mesh, drain, request, len(decoding), there[0].index)
            if not there or (drain.moves[request.id] and not self._send_away(request, mesh, drain)):
                self._refused[mesh.index] = None
                self._room = self._room_now
                return
            if len(drain.leaving) == MOST_LEAVING:
                return

    def _send_away(self, request: Request, mesh: MeshState, drain: Drain) -> bool:
        """Begin a migration to the best mesh that has room and staging; False: none has. Staging for all pages is
        asked for, whatever is cached there, so that no place is reserved in vain."""
        handoffs, source = self._handoffs, mesh.index
        for there in self._router.for_decoding(request, request.kv_len, source, None):
            if handoffs.staging.has_room(request, source, there.index) and handoffs.migrate(request, there.index):
                drain.leaving[request.id] = request.run
                self._moved.add(request.id)
                return True
        return False

    def _is_on_its_way(self, id_: int, run: int) -> bool:
        request = self._requests.get(id_)
        return request is not None and request.run == run and request.state is State.HANDOFF

    def _remaining(self, request: Request) -> float:
        return self._shared.costs.outputs.expected(request.max_tokens - request.dispatched)

    def _decide(self, mesh: MeshState, drain: Drain, request: Request, rows: int, there: int) -> None:
        """Decide whether a mesh that decodes so many is rid of a request sooner by a transfer to the mesh `there` than
        by its end."""
        costs, notes = self._shared.costs, self._shared.notes
        to_finish = self._remaining(request) * costs.decode(mesh.index, rows)
        to_move = costs.transfer(mesh.index, there, self._handoffs.staging.bytes_for(request, mesh.index))
        moves = drain.moves[request.id] = to_move < to_finish
        if notes.are_kept:
            notes.add(DrainChoice(request.id, mesh.index, moves, there, to_finish, to_move))

    def _end(self, mesh: int) -> None:
        self.meshes.pop(mesh, None)
        self._refused.pop(mesh, None)

    # ---- for people

    def held_by(self, mesh: MeshState) -> str:
        """Say what holds a mesh that drains: which requests, how many pages, and why they are there."""
        left = list(self._left(mesh))
        tables = [placement.tables for r in left if (placement := _placement(r, mesh)) is not None]
        pages = sum(len(set[int]().union(*(table.pages for table in group))) for group in zip(*tables, strict=True))
        ids = [str(request.id) for request in left]
        more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
        named = f"request{'s' if len(ids) > 1 else ''} {', '.join(ids[:_MOST_NAMED])}{more}"
        verb = "prefills" if mesh.draining == "prefill" else "decodes"
        return f"mesh {mesh.index} still {verb} {named} with {pages} pages, {self._why(mesh)}"

    def _why(self, mesh: MeshState) -> str:
        if mesh.draining == "prefill":
            return "which it has begun"
        drain = self.meshes[mesh.index]
        if mesh.index in self._refused:
            return "for which no other mesh that decodes has room"
        if drain.leaving:
            return "which leave it two at a time"
        return "which were expected to finish there sooner than to move"

    def check(self) -> None:
        """Raise unless exactly the meshes that drain are here, and each has something left or will be looked at."""
        for mesh in self._all:
            if (mesh.draining is not None) != (mesh.index in self.meshes):
                raise RuntimeError(f"mesh {mesh.index} is {mesh.shown_role} and listed otherwise")
            if mesh.draining is not None and mesh.index not in self._shared.due and not any(self._left(mesh)):
                raise RuntimeError(f"mesh {mesh.index} has drained and nobody has noticed")
        if not self._refused.keys() <= self.meshes.keys():
            raise RuntimeError("a request was refused room on a mesh that does not drain")


def _placement(request: Request, mesh: MeshState) -> Placement | None:
    if _is_here(request, mesh):
        return request.placement
    return None if request.handoff is None else request.handoff.placement


def _is_here(request: Request, mesh: MeshState) -> bool:
    """Return whether the request's KV is on this mesh, and not only a place for it."""
    return request.placement is not None and request.placement.mesh == mesh.index
