"""The links of one worker: opened and timed when it starts, and for each destination the fastest that reaches it.

A link is timed by an offer that the worker fetches itself, which also shows that it works here. Shared memory reaches
the meshes of its machine, a transfer server those of other hosts as well, and so does NIXL, where it is installed. What
none can do is said when somebody needs it, in the sentence of a transfer that fails.
"""

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from .link import Link, LinkError
from .nixl import NixlLink
from .shared_memory import SharedMemoryLink
from .transfer_server import TransferServerLink

_PROBE_BYTES = 16 << 20
_ROUNDS = 2  # after one that does not count
_LOOPBACK = "127.0.0.1"
_SECONDS = 10.0  # that a probe may take


class Links:
    """What a worker offers and fetches by."""

    def __init__(self, links: Sequence[Link], on_machine: Collection[int]) -> None:
        """Take links, the fastest first, and the meshes of this machine, by number."""
        self._links, self._on_machine = {link.kind: link for link in links}, frozenset(on_machine)

    def towards(self, mesh: int) -> Link:
        """Choose the link for offers to a mesh of another worker.

        Raises:
            LinkError: none reaches it.
        """
        for link in self._links.values():
            if mesh in self._on_machine or not isinstance(link, SharedMemoryLink):
                return link
        limits = " ".join(limit for link in self._links.values() for limit in link.limits)
        raise LinkError(f"no link reaches mesh {mesh}, which is on another machine: {limits}")

    def of(self, kind: str) -> Link:
        """Return the link of an offer's kind.

        Raises:
            LinkError: this worker has none.
        """
        if kind not in self._links:
            raise LinkError(f"this worker has no link by {kind}.")
        return self._links[kind]

    def close(self) -> None:
        """Close every link."""
        for link in self._links.values():
            link.close()


def open_links(on_machine: Collection[int], host: str | None) -> Links:
    """Open the links that work here, and time them where there are several.

    Args:
        on_machine: the meshes of this machine, by number.
        host: this machine's address as workers of other hosts reach it; None: there are none.
    """
    links, refused = list[Link](), list[str]()
    makes: list[Callable[[], Link]] = [SharedMemoryLink, lambda: TransferServerLink(host or _LOOPBACK)]
    if find_spec("nixl") is not None:
        makes.append(NixlLink)
    for make in makes:
        if links and host is None:
            break  # nobody needs more
        try:
            links.append(make())
        except LinkError as error:
            refused.append(str(error))
    for why in refused:
        warnings.warn(f"a link for KV between workers is not there: {why}", stacklevel=2)
    if len(links) > 1:
        device = jax.local_devices()[0]
        links.sort(key=lambda link: time_link(link, device))
    return Links(links, on_machine)


def time_link(link: Link, device: jax.Device) -> float:
    """Return the seconds in which an array goes through a link, from a device to itself: the least of a few."""
    place = jax.sharding.SingleDeviceSharding(device)
    array = jax.block_until_ready(jax.device_put(jnp.zeros(_PROBE_BYTES // 4, jnp.float32), place))
    wanted = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)]

    def once() -> float:
        start = time.perf_counter()
        offer = link.offer([array])
        try:
            jax.block_until_ready(link.fetch(offer, wanted, _SECONDS))
        except BaseException:
            link.withdraw(offer.uuid)
            raise
        seconds = time.perf_counter() - start
        link.release(offer.uuid)
        return seconds

    try:
        once()
        return min(once() for _ in range(_ROUNDS))
    except LinkError as error:
        warnings.warn(f"a link by {link.kind} does not work here: {error}", stacklevel=2)
        return float("inf")
