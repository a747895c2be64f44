"""Which meshes a request may go to: short lists, in the policy's order, however many meshes there are.

At most `MOST` meshes are ranked: some of those that have the most of the request's blocks, and those with the least
load on which it surely fits. Where there are no more than `MOST` meshes with a free slot, all of them are. Load comes
first in both: of many meshes that have a block, as where all prompts share one, the least loaded are taken.

Invariant: for every mesh that is not in `RoomChanges.changed`, what is kept here of its load and room is so.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter

from ..config import EngineConfig
from ..paging.prefix_index import members
from .mesh_state import MeshState, SharedState
from .policy import Policy
from .request import Request

MOST = 8
_WITH_PREFIX = MOST // 2  # of these, those taken for the blocks that they have
_MESH = itemgetter(1)  # of an entry by load


class Router:
    """The lists of one engine."""

    def __init__(self, config: EngineConfig, meshes: Sequence[MeshState], policy: Policy, shared: SharedState):
        self._config, self._meshes, self._policy, self._shared = config, meshes, policy, shared
        self._prompts, self._decodes = ByLoad(), ByLoad()
        self._roomiest = ByLoad()  # meshes that take prompts, those first on which the longest fits
        self._changed: set[int] = set()  # meshes that have changed since decoding was asked for
        self._longest = [0] * len(meshes)  # pages of the longest sequence that surely fits on each
        self._prefilling = 0  # the set of meshes that prefill, whether or not they have room

    def for_prompt(self, request: Request) -> list[MeshState]:
        """List the meshes for a prompt, the best first."""
        self._refresh()
        found = self._short_list(self._prompts, request, request.to_prefill)
        return sorted(found, key=partial(self._policy.prefill_rank, request)) if len(found) > 1 else found

    def longest_prompt(self) -> int:
        """Return the pages of the longest prompt that surely fits on some mesh now, with nothing cached."""
        self._refresh()
        return self.most_pages()

    def most_pages(self) -> int:
        """Return likewise, without a look at what has changed, what is no less as long as nothing was freed."""
        return -int(self._roomiest.least) if self._roomiest else 0

    def for_decoding(self, request: Request, tokens: int, source: int, destination: int | None) -> list[MeshState]:
        """List the meshes other than `source` for decoding, the best first; only `destination` unless it is None."""
        self._refresh_decodes()
        if destination is not None:
            found = [self._meshes[destination]] if destination in self._decodes and destination != source else []
        else:
            found = [m for m in self._short_list(self._decodes, request, tokens) if m.index != source]
        return sorted(found, key=partial(self._policy.decode_rank, request)) if len(found) > 1 else found

    def blocks_cached(self, request: Request) -> int:
        """Count the first blocks of a prompt that some mesh that prefills has cached, together with their windows."""
        self._refresh()
        hashes, meshes = request.hashes, self._prefilling
        stop = min(len(hashes), request.to_prefill // self._config.page_size)
        if meshes.bit_count() > MOST:
            depth = self._shared.index.depth(hashes, stop, meshes)
            if not depth or self._config.windows == (None,):
                return depth
            meshes &= self._shared.index.meshes(hashes[depth - 1])
        hits = [self._meshes[i].pages.hit(hashes, request.to_prefill) for i in islice(members(meshes), MOST)]
        return max(hits) // self._config.page_size

    def _short_list(self, by_load: "ByLoad", request: Request, tokens: int) -> list[MeshState]:
        """List, in their own order, the meshes to be ranked for a sequence of so many tokens."""
        found = members(by_load.meshes)
        if len(by_load) > MOST:
            found = iter(sorted(self._least_loaded(by_load, request.hashes, tokens)))
        return [self._meshes[mesh] for mesh in found]

    def _least_loaded(self, by_load: "ByLoad", hashes: Sequence[bytes], tokens: int) -> list[int]:
        """List the least loaded of those that have the most of these blocks and may hold the rest, and of those that
        surely hold all."""
        index, size, longest = self._shared.index, self._config.page_size, self._longest
        depth = index.depth(hashes, min(len(hashes), tokens // size), by_load.meshes)
        holders, pages = index.meshes(hashes[depth - 1]) if depth else 0, self._config.pages_for(tokens)
        roomy = [mesh for mesh in by_load if longest[mesh] >= pages - depth]
        near = list(islice((mesh for mesh in roomy if holders >> mesh & 1), _WITH_PREFIX))
        others = (mesh for mesh in roomy if longest[mesh] >= pages and mesh not in near)
        return [*near, *islice(others, MOST - len(near))]

    def _refresh(self) -> None:
        """Look again at the meshes that have changed, as far as prompts are concerned."""
        changed = self._shared.room.changed
        for index in changed:
            mesh = self._meshes[index]
            load = _load_for_prompts(mesh)
            self._prompts.put(index, load)
            self._longest[index] = mesh.pages.longest(mesh.watermark)
            self._roomiest.put(index, None if load is None else -self._longest[index])
            self._prefilling = self._prefilling & ~(1 << index) | mesh.prefills << index
        self._changed |= changed
        changed.clear()

    def _refresh_decodes(self) -> None:
        """Look again at all that have changed, as far as decoding is concerned: it is asked for less often."""
        self._refresh()
        for index in self._changed:
            self._decodes.put(index, _load_for_decoding(self._meshes[index]))
        self._changed.clear()

    def check(self) -> None:
        """Raise unless what is kept of every mesh is so."""
        self._refresh_decodes()
        for mesh in self._meshes:
            found = self._prompts.load(mesh.index), self._decodes.load(mesh.index), self._longest[mesh.index]
            if found != (_load_for_prompts(mesh), _load_for_decoding(mesh), mesh.pages.longest(mesh.watermark)):
                raise RuntimeError(f"mesh {mesh.index} has changed since loads and room were found to be {found}")


def _load_for_prompts(mesh: MeshState) -> int | None:
    """Return a mesh's load for prompts, the lower the better; None: it takes none now."""
    return mesh.load if mesh.prefills and mesh.pages.slots.num_free and not mesh.is_backed_up else None


def _load_for_decoding(mesh: MeshState) -> float | None:
    """Return likewise a mesh's load for decoding."""
    return -mesh.pages.room if mesh.decodes and mesh.pages.slots.num_free else None


class ByLoad:
    """Meshes with a load, sorted by it; of equal loads the first mesh comes first."""

    def __init__(self) -> None:
        self.meshes = 0  # the set of them, a bit each
        self._loads: dict[int, float] = {}
        self._sorted: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, mesh: int) -> bool:
        return mesh in self._loads

    def __iter__(self) -> Iterator[int]:
        return map(_MESH, self._sorted)

    def load(self, mesh: int) -> float | None:
        """Return the load of a mesh; None: it is not here."""
        return self._loads.get(mesh)

    @property
    def least(self) -> float:
        """Return the least load of all, of which there is one."""
        return self._sorted[0][0]

    def put(self, mesh: int, load: float | None) -> None:
        """Change the load of a mesh; None: take it out."""
        before = self._loads.get(mesh)
        if load == before:
            return
        if before is not None:
            del self._sorted[bisect_left(self._sorted, (before, mesh))]
        if load is None:
            del self._loads[mesh]
            self.meshes ^= 1 << mesh
            return
        insort(self._sorted, (load, mesh))
        self._loads[mesh] = load
        self.meshes |= 1 << mesh
