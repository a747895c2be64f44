"""How fast KV moves between two meshes, timed once at start-up, and a warning where it seems to pass through the host.

A direct transfer is handed to the devices and the call returns at once. Where JAX or the machine cannot do that, the
call itself carries the data through host memory: the one thread that dispatches to all meshes then stands still for as
long. What is timed is one transfer at a time, with nothing else running, of enough pages to show a rate.

Not here: choosing meshes by their links, and traffic of a running engine (`protocol/results.py`).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax

from ..protocol.actions import StartTransfer
from ..worker.kv_transfer import Staging, abstract_staging, plan, send, staged_pages
from ..worker.mesh_plan import MeshPlan
from ..worker.mesh_worker import MeshWorker

# A blocked call is felt from here on: about one decode step of a small model on a GPU.
_SLOW_SECONDS = 0.010
_ROUNDS = 3
# Enough to measure a rate; a whole staging of a long request would cost seconds of every start.
_ENOUGH_BYTES = 32 << 20


@dataclass(frozen=True)
class Link:
    """One timed transfer between two meshes."""

    source: int  # mesh, by index in the topology
    destination: int  # likewise
    bytes: int
    seconds: float  # until all had arrived
    seconds_to_return: float  # that the call itself took

    @property
    def rate(self) -> float:
        """Return bytes per second."""
        return self.bytes / max(self.seconds, 1e-9)


def time_links(meshes: Sequence[MeshWorker], clock: Callable[[], float]) -> list[Link]:
    """Time every pair of meshes between which KV may move, before the engine runs; `clock` is in seconds."""
    return [
        _time_pair(meshes, source, destination, clock)
        for destination, mesh in enumerate(meshes)
        for source in range(len(meshes))
        if source != destination and mesh.plan.spec.decodes
    ]


def _time_pair(meshes: Sequence[MeshWorker], source: int, destination: int, clock: Callable[[], float]) -> Link:
    before, after = meshes[source].plan, meshes[destination].plan
    route = plan(before.model.num_kv_heads, before.mesh.size, after.mesh.size)
    sizes = {bucket: _bytes(before, after.mesh.size, bucket) for bucket in before.config.handoff_buckets}
    bucket = min((b for b in sizes if sizes[b] >= _ENOUGH_BYTES), default=max(sizes))
    nothing = ((),) * len(before.config.windows)  # all padding: as many bytes move, and no page is named
    action = StartTransfer(0, bucket, source, None, nothing, destination)
    return time_link(
        source, destination,
        partial(meshes[source].gather, action, after.mesh.size),
        partial(send, source=before.mesh, destination=after.mesh, route=route),
        clock,
    )  # fmt: skip


def _bytes(source: MeshPlan, destination_tp: int, bucket: int) -> int:
    """Return the size of what `gather` returns."""
    route = plan(source.model.num_kv_heads, source.mesh.size, destination_tp)
    staging = abstract_staging(source.state, source.mesh, route, staged_pages(source.config, bucket))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(staging))


def time_link(
    source: int,
    destination: int,
    gather: Callable[[], Staging],
    send: Callable[[Staging], Staging],
    clock: Callable[[], float],
) -> Link:
    """Time the fastest of a few transfers, after one that does not count.

    `gather` makes the staging on the source, `send` starts its copy to the destination; `clock` is in seconds.
    """

    def once() -> Link:
        staging = jax.block_until_ready(gather())
        start = clock()
        sent = send(staging)
        returned = clock()
        jax.block_until_ready(sent)
        size = sum(x.nbytes for x in jax.tree.leaves(sent))
        return Link(source, destination, size, clock() - start, returned - start)

    once()
    return min((once() for _ in range(_ROUNDS)), key=lambda link: link.seconds)


def looks_staged(link: Link) -> bool:
    """Return whether a call that should return at once kept the host for most of a transfer that was slow."""
    return link.seconds > _SLOW_SECONDS and link.seconds_to_return > link.seconds / 2


def warn_if_staged(link: Link) -> None:
    """Warn once, if `looks_staged`: which meshes, how fast, what to do."""
    if looks_staged(link):
        warnings.warn(
            f"KV from mesh {link.source} to mesh {link.destination} seems to pass through the host's memory "
            f"({link.rate / 1e9:.1f} GB/s; the call took {1e3 * link.seconds_to_return:.0f} of "
            f"{1e3 * link.seconds:.0f} ms): choose devices that reach each other directly, or both=N, "
            "which moves no KV.",
            stacklevel=2,
        )
