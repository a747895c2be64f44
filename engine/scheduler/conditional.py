"""Conditional prefill: prompts that are computed on a decode mesh, between the steps of the answers there.

The answer then begins where its KV is, with no hand-off. Invariants: the mesh stays a decode mesh, to which no other
prompt comes for this one's sake; what it has left to compute fits into one prefill step; by the measured costs that
step and the decode step after it take no longer than the TPOT target of any answer that runs there or is on its way, so
none is slowed down beyond its target. An answer without an SLO has no such time to give away: beside it no prompt is
computed. Only in pools, whose meshes have the programs for it.
"""

from collections.abc import Iterable

from .mesh_state import MeshState
from .ranking import prompt_terms
from .request import Request


def gap(mesh: MeshState, tokens: int, rows: int) -> float:
    """Return the seconds from one token of an answer there to the next, with so many prompt tokens computed between."""
    costs = mesh.shared.costs
    return costs.prefill(mesh.index, tokens) + costs.decode(mesh.index, rows)


def decode_meshes_for(request: Request, meshes: Iterable[MeshState], rival: MeshState | None) -> list[MeshState]:
    """List those of `meshes` that could prefill the prompt without harm and would have its first token no later than
    `rival`, the best of those that prefill, has handed it over; the soonest first. None: no such mesh takes it now."""
    found = []
    for mesh in meshes:
        if mesh.prefills or mesh.draining is not None or not _is_harmless(request, mesh):
            continue
        seconds = _first_token(request, mesh)
        if rival is None or seconds <= _first_token(request, rival) + _link(request, rival, mesh):
            found.append((seconds, -mesh.pages.room, mesh.index, mesh))
    return [mesh for *_, mesh in sorted(found)]


def _is_harmless(request: Request, mesh: MeshState) -> bool:
    costs = mesh.shared.costs
    tokens = request.to_prefill - mesh.pages.hit(request.hashes, request.to_prefill)
    tokens += mesh.to_compute + len(request.siblings)  # each of these computes its last token for itself
    if tokens > costs.chunk_size:
        return False
    if not mesh.placed:
        return True
    target = mesh.targets.tightest
    return bool(target) and costs.is_measured(mesh.index) and gap(mesh, tokens, len(mesh.placed) + 1) <= target


def _first_token(request: Request, mesh: MeshState) -> float:
    terms = prompt_terms(request, mesh)
    return terms.wait + terms.own


def _link(request: Request, source: MeshState, destination: MeshState) -> float:
    pages = -(-request.to_prefill // destination.pages.page_size)
    return destination.shared.costs.transfer(source.index, destination.index, pages * destination.page_bytes)
