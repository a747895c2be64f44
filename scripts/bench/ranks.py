"""Rivals of the engine's own choice of a mesh: policies that rank meshes as simpler routers do.

All serve in order of arrival. Where the first in rank has no room, the next is taken, as with any policy.
"""

from collections.abc import Sequence

from twinmesh.engine.scheduler.mesh_state import MeshState
from twinmesh.engine.scheduler.policy import FirstComeFirstServed
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.topology import MeshSpec


class _Rank(FirstComeFirstServed):
    """What the rivals share: decoding goes where most pages are free."""

    def decode_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh with the most free pages."""
        return mesh.index == request.lost_on, -mesh.pages.room


class RoundRobin(_Rank):
    """The meshes by turns, for prompts and for decoding."""

    name = "round robin"

    def __init__(self, meshes: Sequence[MeshSpec]):
        """Begin with the first of `meshes`, all of the engine."""
        self._prefills = [index for index, spec in enumerate(meshes) if spec.prefills]
        self._decodes = [index for index, spec in enumerate(meshes) if spec.decodes]

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh whose turn it is."""
        return (_after(request.number, mesh.index, self._prefills),)

    def decode_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh whose turn it is."""
        return (_after(request.number, mesh.index, self._decodes),)


def _after(turn: int, mesh: int, meshes: Sequence[int]) -> int:
    """Count how many places a mesh comes after the one whose turn it is."""
    return (meshes.index(mesh) - turn) % len(meshes) if mesh in meshes else len(meshes)


class LeastLoad(_Rank):
    """Where the fewest requests are, as load balancers count: those that run and those placed to run."""

    name = "least load"

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh with the fewest requests."""
        return (len(mesh.placed),)


class LongestPrefixFirst(_Rank):
    """Where most of the prompt is cached and, of those, the fewest requests are."""

    name = "longest prefix"

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the mesh with the longest prefix."""
        cached = mesh.pages.hit(request.hashes, request.to_prefill)
        return -cached, len(mesh.placed)


class RankOfEfd1214(_Rank):
    """The engine's own rank at commit efd1214: prompt tokens to be computed less what is cached, then free slots."""

    name = "efd1214"

    def prefill_rank(self, request: Request, mesh: MeshState) -> tuple[float, ...]:
        """Prefer the least to compute before the request's first token."""
        cached = mesh.pages.hit(request.hashes, request.to_prefill)
        return mesh.index == request.lost_on, mesh.prefill_load - cached, -mesh.pages.slots.num_free
