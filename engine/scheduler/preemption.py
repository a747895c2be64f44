"""Who gives up a place for whom.

A request for whose prompt, or whose decoding, there are too few slots or pages takes the place of others behind it in
the order: an interactive one that of batch requests, and of interactive ones with a higher priority number. Those of
its own priority keep theirs, as under first come first served: only growth preempts among equals. A request that grows
where no page is left takes those of others behind it, whatever their priority. The last in the order goes first, so
batch requests do. Whoever gives way is behind the one for whom it does, so the first of all is never a victim, and
always finishes. A request that was preempted `MOST_PREEMPTIONS` times for others is no victim of its own class any
more, unless the first on a mesh could not go on otherwise.

Nobody is preempted in vain: who gives way on a mesh makes room enough there, in one go.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from ..config import EngineConfig
from ..paging.block_table import Placement
from .lifecycle import Lifecycle
from .mesh_state import MeshState, SharedState
from .order import MOST_PREEMPTIONS
from .request import Request

_MOST_MESHES = 8  # that are looked at for one request


class Preemption:
    """Preemption for requests that find no room on any mesh."""

    def __init__(
        self, config: EngineConfig, meshes: Sequence[MeshState], shared: SharedState, lifecycle: Lifecycle
    ) -> None:
        self._config, self._meshes, self._lifecycle = config, meshes, lifecycle
        self._levels, self._room = shared.levels, shared.room
        self._vain: dict[str, tuple[int, int, int]] = {}  # by phase, for whom and when nothing was found
        self._helped: set[tuple[str, int]] = set()  # phase and run of those that were helped in this decision

    def begin(self) -> None:
        """Begin a decision, in which nobody is helped twice."""
        self._helped.clear()

    def for_prompt(self, request: Request | None) -> bool:
        """Make room for a prompt that found none; return whether there is some now."""
        if request is None or not self._may_help(request, "prompt"):
            return False
        meshes = [mesh for mesh in self._above(request) if mesh.prefills]
        return self._make_room(request, "prompt", meshes, request.to_prefill)

    def for_credit(self, request: Request | None) -> bool:
        """Make room on a decode mesh for a request that got no credit; return whether there is some now."""
        if request is None or request.placement is None or not self._may_help(request, "credit"):
            return False
        source = request.placement.mesh
        meshes = [mesh for mesh in self._above(request) if mesh.decodes and mesh.index != source]
        return self._make_room(request, "credit", meshes, max(request.to_prefill, request.kv_len))

    def _above(self, request: Request) -> list[MeshState]:
        return [self._meshes[index] for index in self._levels.meshes_above(request.level)]

    def _may_help(self, request: Request, phase: str) -> bool:
        """Return whether a look may find somebody: it found nobody before, and nothing has changed since."""
        return (
            self._levels.has_above(request.level)
            and self._vain.get(phase) != self._state(request)
            and (phase, request.run) not in self._helped
        )

    def _state(self, request: Request) -> tuple[int, int, int]:
        return request.run, self._room.freed, self._levels.entered

    def _make_room(self, request: Request, phase: str, meshes: Sequence[MeshState], tokens: int) -> bool:
        """Preempt on the mesh where the fewest have to give way; of equal ones where the last in the order is."""
        best: list[Request] = []
        for mesh in islice((mesh for mesh in meshes if mesh.placed[-1].order > request.order), _MOST_MESHES):
            victims = self._victims(request, mesh, tokens, for_prompt=phase == "prompt")
            if victims and (not best or _is_better(victims, best)):
                best = victims
        for victim in best:
            self._lifecycle.displace(victim)
        if best:
            self._helped.add((phase, request.run))
        else:
            self._vain[phase] = self._state(request)
        return bool(best)

    def _victims(self, request: Request, mesh: MeshState, tokens: int, *, for_prompt: bool) -> list[Request]:
        """List those that have to give way on a mesh, the last in the order first; none: it would not be enough."""
        room = _Room(self._config, mesh, request, tokens, checks_kept=for_prompt)
        victims: list[Request] = []
        for other in reversed(mesh.placed):
            if other.order < request.order:
                break
            if may_displace(request, other):
                victims.append(other)
                room.take(other)
                if room.is_enough:
                    return victims
        return []


class _Room:
    """What a mesh would have free for one request if others gave way."""

    def __init__(self, config: EngineConfig, mesh: MeshState, request: Request, tokens: int, *, checks_kept: bool):
        self._mesh, self._gone, self._checks_kept = mesh, set[Placement](), checks_kept
        self._held = [Counter[int]() for _ in mesh.pages.groups]  # pages of those that give way
        self._freed = [0] * len(mesh.pages.groups)
        self._needed = [min(config.pages_for(tokens), config.most_pages(window)) for window in config.windows]
        self._hits = frozenset[int]()
        if config.windows == (None,):  # elsewhere a window's pages count too: as though nothing were cached
            (group,) = mesh.pages.groups
            run = group.cached.run(request.hashes[: mesh.pages.hit(request.hashes, tokens) // config.page_size])
            self._hits = frozenset(run.pages)
            self._needed = [self._needed[0] - len(run.pages) + group.count_idle(run.array)]

    def take(self, request: Request) -> None:
        """Count what a request gives back."""
        handoff = request.handoff
        for placement in (request.placement, None if handoff is None else handoff.placement):
            if placement is None or placement.mesh != self._mesh.index:
                continue
            self._gone.add(placement)
            for group, table in enumerate(placement.tables):
                self._freed[group] += len(table.spare)
                held, pages = self._held[group], self._mesh.pages.groups[group]
                for page in table.pages:
                    held[page] += 1
                    self._freed[group] += held[page] == pages.holders(page) and page not in self._hits

    @property
    def is_enough(self) -> bool:
        """Return whether the request surely finds room."""
        mesh, gone = self._mesh, self._gone
        if self._checks_kept and mesh.kept.are_too_many(gone, self._freed):
            return False
        watermark = max(0, mesh.watermark - len(gone))  # of a mesh that drains decodes, too
        return all(
            needed + watermark <= pages.num_free + freed
            for needed, freed, pages in zip(self._needed, self._freed, mesh.pages.groups, strict=True)
        )


def _is_better(victims: Sequence[Request], others: Sequence[Request]) -> bool:
    if len(victims) != len(others):
        return len(victims) < len(others)
    return bool(victims[0].order > others[0].order)


def may_displace(request: Request, other: Request) -> bool:
    """Return whether a request may take the place of another of a higher level that is behind it."""
    if other.level <= request.level or other.order < request.order:
        return False
    return other.level[0] != request.level[0] or other.preempted < MOST_PREEMPTIONS
