"""Which meshes a request may go to: short lists, in the policy's order, however many meshes there are.

At most `MOST` meshes are ranked: some of those that have the most of the request's blocks, and those with the least
load on which it surely fits. Where there are no more than `MOST` meshes with a free slot, all of them are. Load comes
first in both: of many meshes that have a block, as where all prompts share one, the least loaded are taken. The mesh
where a conversation has left its KV is ranked too, and taken where the policy has no better one.

Invariant: for every mesh that is not in `RoomChanges.changed`, what is kept here of its load and room is so.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from ..paging.prefix_index import members
from .conditional_prefill import note_on, with_decode_meshes
from .mesh_state import MeshState, SharedState
from .notes import Candidate, Phase, Routed
from .policy import Policy
from .ranking import DecodeTerms, PromptTerms, decode_terms, prompt_terms
from .request import Request

type Rank = Callable[[Request, MeshState], Any]
type TermsOf = Callable[[Request, MeshState], PromptTerms | DecodeTerms]

MOST = 8
_WITH_PREFIX = MOST // 2  # of these, those taken for the blocks that they have
_LOOKED_AT = 4 * MOST  # of those with the least load; where few of them have room, those with the most room follow
_MESH = itemgetter(1)  # of an entry by load


class Router:
    """The lists of one engine."""

    def __init__(self, shared: SharedState, policy: Policy):
        self._config, self._meshes, self._policy, self._shared = shared.config, shared.meshes, policy, shared
        self._prompts, self._decodes = ByLoad(), ByLoad()
        self._changed: set[int] = set()  # meshes that have changed since decoding was asked for
        self._longest = [0] * len(shared.meshes)  # pages of the longest sequence that surely fits on each
        self._ranked: tuple[Candidate, ...] = ()  # for the request that was asked for last, if notes are kept
        self._is_pool = shared.config.topology.is_pool
        # The sets of meshes that prefill, and of those that decode alone, whether or not they have room.
        self._prefilling = self._decoding = 0

    def for_prompt(self, request: Request) -> Sequence[MeshState]:
        """List the meshes for a prompt, the best first."""
        self._refresh()
        request.home = self._home(request, self._prompts)
        found = self._short_list(self._prompts, request, request.to_prefill)
        ranked = self._sorted(found, request, self._policy.prefill_rank, prompt_terms)
        return self._with_decode_meshes(request, ranked) if self._is_pool else ranked

    def _with_decode_meshes(self, request: Request, ranked: Sequence[MeshState]) -> Sequence[MeshState]:
        """Add the decode meshes that may prefill this prompt: what is not cached there has to fit into one step."""
        if not self._decoding:
            return ranked
        self._refresh_decodes()
        size, tokens, among = self._config.page_size, request.to_prefill, self._decodes.meshes
        cached = size * self._shared.index.depth(request.hashes, min(len(request.hashes), tokens // size), among)
        if tokens - cached > self._config.chunk_size:
            return ranked
        return with_decode_meshes(request, ranked, self._short_list(self._decodes, request, tokens))

    def chosen(self, request: Request, phase: Phase, mesh: MeshState) -> None:
        """Note which of the ranked meshes was taken."""
        if phase == "prefill" and not mesh.prefills and self._shared.notes.are_kept:
            self._shared.notes.add(note_on(request, mesh))
        elif self._ranked:
            self._shared.notes.add(Routed(request.id, phase, mesh.index, self._ranked))

    def longest_prompt(self) -> int:
        """Return the pages of the longest prompt that surely fits on some mesh now, with nothing cached."""
        self._refresh()
        return self.most_pages()

    def most_pages(self) -> int:
        """Return likewise, without a look at what has changed, what is no less as long as nothing was freed."""
        return self._prompts.most_room

    def for_decoding(self, request: Request, tokens: int, source: int, destination: int | None) -> list[MeshState]:
        """List the meshes other than `source` for decoding, the best first; only `destination` unless it is None."""
        self._refresh_decodes()
        request.home = self._home(request, self._decodes)
        if destination is not None:
            found = [self._meshes[destination]] if destination in self._decodes and destination != source else []
        else:
            found = [m for m in self._short_list(self._decodes, request, tokens) if m.index != source]
        return self._sorted(found, request, self._policy.decode_rank, decode_terms)

    def _sorted(self, found: list[MeshState], request: Request, rank: Rank, terms: TermsOf) -> list[MeshState]:
        """Sort meshes by a rank; if notes are kept, keep the terms too, for the case that one of them is taken."""
        if len(found) > 1:
            found = sorted(found, key=partial(rank, request))
        if self._shared.notes.are_kept:
            ranked = found if len(found) > 1 else ()
            self._ranked = tuple(_candidate(mesh, request, terms(request, mesh)) for mesh in ranked)
        return found

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
        return max(hits, default=0) // self._config.page_size

    def _short_list(self, by_load: "ByLoad", request: Request, tokens: int) -> list[MeshState]:
        """List, in their own order, the meshes to be ranked for a sequence of so many tokens."""
        found = members(by_load.meshes)
        if len(by_load) > MOST:
            found = iter(sorted(self._least_loaded(by_load, request, tokens)))
        return [self._meshes[mesh] for mesh in found]

    def _home(self, request: Request, by_load: "ByLoad") -> int | None:
        """Find the mesh, of these, where the conversation that the request goes on with has left its KV."""
        session = self._shared.sessions.of(request)
        return None if session is None else next((mesh for mesh in session.meshes if mesh in by_load), None)

    def _least_loaded(self, by_load: "ByLoad", request: Request, tokens: int) -> list[int]:
        """List the least loaded of those that have the most of the request's blocks and may hold the rest, the one
        that its conversation knows, and the least loaded of those that surely hold all."""
        hashes, home = request.hashes, request.home
        index, size, longest = self._shared.index, self._config.page_size, self._longest
        depth = index.depth(hashes, min(len(hashes), tokens // size), by_load.meshes)
        pages = self._config.pages_for(tokens)
        near = self._holders(by_load, index.meshes(hashes[depth - 1]), pages - depth) if depth else []
        if home is not None and home not in near and longest[home] >= pages - depth:
            near.append(home)
        found = dict.fromkeys(near)
        for mesh in chain(islice(by_load, _LOOKED_AT), by_load.roomiest(pages)):
            if len(found) == MOST:
                break
            if longest[mesh] >= pages:
                found[mesh] = None
        return list(found)

    def _holders(self, by_load: "ByLoad", holders: int, pages: int) -> list[int]:
        """List the least loaded of these meshes that have so many pages free: of many, among those that have the least
        load of all and some others."""
        among = list(islice(members(holders & by_load.meshes), _LOOKED_AT))
        if len(among) == _LOOKED_AT:
            least = (mesh for mesh in islice(by_load, _LOOKED_AT) if holders >> mesh & 1)
            among = list(dict.fromkeys([*least, *among]))
        roomy = [mesh for mesh in among if self._longest[mesh] >= pages]
        return sorted(roomy, key=by_load.place)[:_WITH_PREFIX]

    def _refresh(self) -> None:
        """Look again at the meshes that have changed, as far as prompts are concerned."""
        changed = self._shared.room.changed
        for index in changed:
            mesh = self._meshes[index]
            longest = self._longest[index] = mesh.pages.longest(mesh.watermark)
            self._prompts.put(index, _load_for_prompts(mesh), longest)
            self._prefilling = self._prefilling & ~(1 << index) | mesh.prefills << index
            self._decoding = self._decoding & ~(1 << index) | (mesh.decodes and not mesh.prefills) << index
        self._changed |= changed
        changed.clear()

    def _refresh_decodes(self) -> None:
        """Look again at all that have changed, as far as decoding is concerned: it is asked for less often."""
        self._refresh()
        for index in self._changed:
            self._decodes.put(index, _load_for_decoding(self._meshes[index]), self._longest[index])
        self._changed.clear()

    def check(self) -> None:
        """Raise unless what is kept of every mesh is so."""
        self._refresh_decodes()
        for mesh in self._meshes:
            found = self._prompts.load(mesh.index), self._decodes.load(mesh.index), self._longest[mesh.index]
            if found != (_load_for_prompts(mesh), _load_for_decoding(mesh), mesh.pages.longest(mesh.watermark)):
                raise RuntimeError(f"mesh {mesh.index} has changed since loads and room were found to be {found}")


def _candidate(mesh: MeshState, request: Request, terms: PromptTerms | DecodeTerms) -> Candidate:
    return Candidate(mesh.index, mesh.pages.hit(request.hashes, request.to_prefill), terms._asdict())


def _load_for_prompts(mesh: MeshState) -> int | None:
    """Return a mesh's load for prompts, the lower the better; None: it takes none now."""
    return mesh.load if mesh.prefills and mesh.pages.slots.num_free and not mesh.is_backed_up else None


def _load_for_decoding(mesh: MeshState) -> float | None:
    """Return likewise a mesh's load for decoding."""
    return -mesh.pages.room if mesh.decodes and mesh.pages.slots.num_free else None


class ByLoad:
    """Meshes with a load, sorted by it; of equal loads the first mesh comes first. They are sorted by room, too."""

    def __init__(self) -> None:
        self.meshes = 0  # the set of them, a bit each
        self._places: dict[int, tuple[float, int]] = {}  # mesh -> load, mesh
        self._sorted: list[tuple[float, int]] = []
        self._longest: dict[int, tuple[int, int]] = {}  # mesh -> pages, mesh
        self._by_room: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, mesh: int) -> bool:
        return mesh in self._places

    def __iter__(self) -> Iterator[int]:
        return map(_MESH, self._sorted)

    def place(self, mesh: int) -> tuple[float, int]:
        """Return the place in the order of a mesh that is here: its load, and which it is."""
        return self._places[mesh]

    def load(self, mesh: int) -> float | None:
        """Return the load of a mesh; None: it is not here."""
        return self._places[mesh][0] if mesh in self._places else None

    @property
    def most_room(self) -> int:
        """Return the pages of the longest sequence that fits on one of them; 0: there is none."""
        return self._by_room[-1][0] if self._by_room else 0

    def roomiest(self, pages: int) -> Iterator[int]:
        """Yield the meshes with room for a sequence of so many pages, those with the most room first."""
        for at in range(len(self._by_room) - 1, -1, -1):
            if self._by_room[at][0] < pages:
                return
            yield self._by_room[at][1]

    def put(self, mesh: int, load: float | None, longest: int) -> None:
        """Change the load of a mesh, and the pages of the longest sequence that fits there; load None: take it out."""
        before = self._places.get(mesh)
        if before is None or load != before[0]:
            _move(self._sorted, before, None if load is None else (load, mesh))
        if load is None:
            if before is not None:
                _move(self._by_room, self._longest.pop(mesh), None)
                del self._places[mesh]
                self.meshes ^= 1 << mesh
            return
        self._places[mesh] = load, mesh
        self.meshes |= 1 << mesh
        room = self._longest.get(mesh)
        if room is None or longest != room[0]:
            self._longest[mesh] = longest, mesh
            _move(self._by_room, room, self._longest[mesh])


def _move[Key: tuple[float, int]](sorted_: list[Key], before: Key | None, now: Key | None) -> None:
    """Take one out of a sorted list, unless it is None, and put another in."""
    if before is not None:
        del sorted_[bisect_left(sorted_, before)]
    if now is not None:
        insort(sorted_, now)
