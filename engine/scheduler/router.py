"""Which mesh takes a request: small pure policies. The lowest rank is asked first. No state, no JAX here."""

from .mesh_state import MeshState
from .request import Request


def prefill_rank(request: Request, mesh: MeshState) -> tuple[float, ...]:
    """Where the least is to be computed before the request's first token: outstanding prompts less what is cached."""
    cached = mesh.cache.hit(request.hashes, request.to_prefill)
    return mesh.index == request.lost_on, mesh.prefill_load - cached, -mesh.cache.slots.num_free


def decode_rank(request: Request, mesh: MeshState) -> tuple[float, ...]:
    """Where most pages are free."""
    return mesh.index == request.lost_on, -mesh.cache.room
