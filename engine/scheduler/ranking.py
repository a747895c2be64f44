"""What it would cost, in seconds, to have a request on a mesh: the terms by which policies rank meshes.

A term is time that somebody waits: the request itself, or those that run there or come after it. What it costs anywhere
(the steps of its answer, run alone) is left out. Costs are those measured (`cost.py`), counts the scheduler's own.
Load comes before length of match in this sense: cached tokens spare the seconds that computing them takes, and no more;
they draw a request only as long as what waits and runs there costs less.
"""

from typing import NamedTuple

from .mesh_state import MeshState
from .request import Request


class PromptTerms(NamedTuple):
    """Seconds for a prompt on a mesh."""

    wait: float  # until the prompts before it are computed, with the decode steps that come between their chunks
    own: float  # its own chunks, with the decode steps between them
    harm: float  # its chunks again, for those whom they delay: answers that run there, and prompts that come next
    decode: float  # how much slower its rows are, and make, the decode steps of its answer and of the others
    room: float  # to compute again what will not fit


class DecodeTerms(NamedTuple):
    """Seconds for a hand-off to a mesh."""

    link: float  # to move the pages that are not cached there
    wait: float  # the prompts to be computed there, which delay its steps
    decode: float  # as in `PromptTerms`
    room: float


def prompt_terms(request: Request, mesh: MeshState) -> PromptTerms:
    """Estimate what prefilling the request on a mesh costs, and decoding it where the mesh does that."""
    costs, index, load = mesh.shared.costs, mesh.index, mesh.to_compute_before(request)
    tokens = request.to_prefill - mesh.pages.hit(request.hashes, request.to_prefill)
    fixed, each = costs.prefill_terms(index)
    busy, before, chunks = costs.busy(index), load / costs.chunk_size, -(-tokens // costs.chunk_size)
    own = fixed * chunks + each * tokens
    output = costs.outputs.expected(request.max_tokens - request.confirmed) if mesh.decodes else 0.0
    rows = len(mesh.placed) if mesh.decodes else 0
    room = each * _short(mesh, tokens, rows, output)
    if not rows:
        return PromptTerms(busy + fixed * before + each * load, own, own, 0.0, room)
    step = costs.beside(index, rows)
    wait = busy + (fixed + step) * before + each * load
    return PromptTerms(wait, own + step * (chunks - 1), own, _slower(mesh, rows, output), room)


def decode_terms(request: Request, mesh: MeshState) -> DecodeTerms:
    """Estimate what it costs to hand a request over to a mesh and to decode it there."""
    costs, index, placement = mesh.shared.costs, mesh.index, request.placement
    tokens = max(request.to_prefill, request.kv_len)
    missing = tokens - mesh.pages.hit(request.hashes, tokens)
    size = -(-missing // mesh.pages.page_size) * mesh.page_bytes
    link = 0.0 if placement is None else costs.transfer(placement.mesh, index, size)
    rows, output = len(mesh.placed), costs.outputs.expected(request.max_tokens - request.confirmed)
    fixed, each = costs.prefill_terms(index)
    load = mesh.to_compute
    wait = each * load + fixed * load / costs.chunk_size if load else 0.0
    return DecodeTerms(link, wait, _slower(mesh, rows, output), each * _short(mesh, missing, rows, output))


def _slower(mesh: MeshState, rows: int, output: float) -> float:
    """Return the seconds by which its rows and those there slow each other down until its answer ends."""
    return 2 * rows * mesh.shared.costs.row_seconds(mesh.index) * output if rows else 0.0


def _short(mesh: MeshState, tokens: int, rows: int, output: float) -> float:
    """Count the tokens that will not fit: of these new ones, its answer, of which so many are expected where the mesh
    decodes, and what the answers there still grow by."""
    short = tokens + output * (1 + rows / 2) - mesh.pages.free_tokens
    return short if short > 0 else 0.0
