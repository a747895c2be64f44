"""Staging: the bytes that transfers take on their source and on their destination, from the gather to the scatter.

Invariant: of each mesh's staging (`MeshState.staging`, what is left of it) exactly what the transfers under way take is
taken. Which of them there are is known to `handoffs.py`.
"""

from collections.abc import Iterable, Sequence

from ..config import PoolSize, bucket_for
from .mesh_state import SharedState
from .request import Request, Transfer


class Staging:
    """The staging of all meshes of an engine."""

    def __init__(self, shared: SharedState, pools: Sequence[PoolSize]):
        """Begin with all of it left."""
        self._config, self._meshes, self._pools = shared.config, shared.meshes, pools
        self._caps = [self._config.pages_to_send(window) for window in self._config.windows]
        self.given_back = 0  # how often some was

    def bucket(self, counts: Sequence[int]) -> int:
        """Find the smallest bucket in which so many pages of every group find room."""
        return next(
            bucket
            for bucket in self._config.handoff_buckets
            if all(count <= min(bucket, cap) for count, cap in zip(counts, self._caps, strict=True))
        )

    def bytes_for(self, request: Request, mesh: int) -> int:
        """Return the bytes that all of a request's KV takes on this mesh."""
        return self.bytes_on(mesh, self._whole(request))

    def has_room(self, request: Request, source: int, destination: int) -> bool:
        """Return whether all of a request's KV could be sent at once."""
        return self.ask(source, destination, self._whole(request)) is not None

    def ask(self, source: int, destination: int, bucket: int) -> tuple[int, int] | None:
        """Return the bytes that a transfer takes on source and destination; None: one of them has too few left."""
        needed = self.bytes_on(source, bucket), self.bytes_on(destination, bucket)
        has_room = self._meshes[source].staging >= needed[0] and self._meshes[destination].staging >= needed[1]
        return needed if has_room else None

    def take(self, transfer: Transfer) -> None:
        """Take what a transfer takes, on both of its meshes."""
        self._change(transfer, -1)

    def give_back(self, transfer: Transfer) -> None:
        """Give back what a transfer has taken."""
        self._change(transfer, 1)
        self.given_back += 1

    def check(self, transfers: Iterable[Transfer]) -> None:
        """Raise unless the staging taken on every mesh is what these transfers take."""
        taken = [0] * len(self._meshes)
        for transfer in transfers:
            taken[transfer.source] += transfer.staged[0]
            taken[transfer.destination] += transfer.staged[1]
        for mesh, pool, bytes_taken in zip(self._meshes, self._pools, taken, strict=True):
            if mesh.staging != pool.staging_bytes - bytes_taken:
                raise RuntimeError(f"mesh {mesh.index}: {mesh.staging} bytes of staging left, {bytes_taken} taken")

    def _whole(self, request: Request) -> int:
        return bucket_for(self._config.pages_for(request.kv_len), self._config.handoff_buckets)

    def bytes_on(self, mesh: int, bucket: int) -> int:
        """Return the bytes that a transfer of this size takes on a mesh."""
        return self._pools[mesh].transfer_bytes(bucket, self._caps)

    def _change(self, transfer: Transfer, sign: int) -> None:
        self._meshes[transfer.source].staging += sign * transfer.staged[0]
        self._meshes[transfer.destination].staging += sign * transfer.staged[1]
