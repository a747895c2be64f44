"""Conditional prefill: prompts that are computed on a decode mesh, between the steps of the answers there.

The answer then begins where its KV is, with no hand-off. Invariants: the mesh stays a decode mesh, to which no other
prompt comes for this one's sake; what it has left to compute fits into one prefill step; by the measured costs that
step and the decode step after it take no longer than the TPOT target of any answer that runs there or is on its way, so
none is slowed down beyond its target. An answer without an SLO has no such time to give away: beside it no prompt is
computed. Only in pools, whose meshes have the programs for it.
"""

from collections.abc import Iterable, Sequence
from math import inf

from .mesh_state import MeshState
from .notes import Conditional
from .ranking import prompt_terms
from .request import Request


def with_decode_meshes(
    request: Request, ranked: Sequence[MeshState], decodes: Iterable[MeshState]
) -> Sequence[MeshState]:
    """Add to the meshes ranked for a prompt those of `decodes` that could prefill it without harm: first those that
    would have its first token no later than the best of the ranked has handed it over, the soonest first; the others
    last, for the case that no mesh that prefills has room."""
    sooner: list[tuple[float, float, int, MeshState]] = []
    later: list[tuple[float, float, int, MeshState]] = []
    for mesh in decodes:
        if mesh.prefills or mesh.draining is not None or not _is_harmless(request, mesh):
            continue
        seconds = _first_token(request, mesh)
        is_later = ranked and seconds > _first_token(request, ranked[0]) + _link(request, ranked[0], mesh)
        (later if is_later else sooner).append((seconds, -mesh.pages.room, mesh.index, mesh))
    if not sooner and not later:
        return ranked
    return [*(mesh for *_, mesh in sorted(sooner)), *ranked, *(mesh for *_, mesh in sorted(later))]


def _is_harmless(request: Request, mesh: MeshState) -> bool:
    costs = mesh.shared.costs
    tokens = request.to_prefill - mesh.pages.hit(request.hashes, request.to_prefill)
    tokens += mesh.to_compute + len(request.siblings)  # each of these computes its last token for itself
    if tokens > costs.chunk_size:
        return False
    if not mesh.placed:
        return True
    target = mesh.targets.tightest
    return bool(target) and costs.is_measured(mesh.index) and _gap(mesh, tokens, len(mesh.placed) + 1) <= target


def note_on(request: Request, mesh: MeshState) -> Conditional:
    """Say why a decode mesh was given this prompt, which it has by now."""
    rows, target = len(mesh.placed) - 1, mesh.targets.besides(request.tpot_target)
    seconds = _gap(mesh, mesh.to_compute, rows + 1)
    return Conditional(request.id, mesh.index, rows, seconds, None if target == inf else target)


def _gap(mesh: MeshState, tokens: int, rows: int) -> float:
    """Return the seconds from one token of an answer there to the next, with so many prompt tokens computed between."""
    costs = mesh.shared.costs
    return costs.prefill(mesh.index, tokens) + costs.decode(mesh.index, rows)


def _first_token(request: Request, mesh: MeshState) -> float:
    terms = prompt_terms(request, mesh)
    return terms.wait + terms.own


def _link(request: Request, source: MeshState, destination: MeshState) -> float:
    pages = -(-request.to_prefill // destination.pages.page_size)
    return destination.shared.costs.transfer(source.index, destination.index, pages * destination.page_bytes)
