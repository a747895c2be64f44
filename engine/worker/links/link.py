"""The contract of a link: how arrays of one process come to the devices of another.

A source offers arrays and gets a `KVOffer`, plain data that crosses in a message; the destination fetches what it
describes. Each offer has a uuid of its own and is fetched once. A retry is a new offer: what became of the first fetch
nobody knows, and JAX's transfer server never answers a second pull of the same uuid.

Both calls block, `offer` until the arrays are computed and held ready, `fetch` until they have arrived or the time is
over: they belong on a waiter's thread, never on the one that dispatches. A link knows nothing of pages, requests or
meshes: `parcels.py` makes the arrays of a `Staging`, and a `Staging` of arrays.
"""

import secrets
from collections.abc import Sequence
from typing import Protocol

import jax

from ...protocol.offers import KVOffer, Parcel


class LinkError(RuntimeError):
    """A fetch that failed or an offer that could not be made, in one sentence; it costs one retry, not a mesh."""


class Link(Protocol):
    """One kind of link as one process has it, for offers of its own and for those of others. Threads may share it."""

    @property
    def kind(self) -> str:
        """Return the name that offers carry and that options and reports use."""
        ...

    @property
    def limits(self) -> tuple[str, ...]:
        """Say in sentences what this link cannot do here; nothing to say: an empty tuple."""
        ...

    def offer(self, arrays: Sequence[jax.Array]) -> KVOffer:
        """Hold arrays ready to be fetched; returns once they are computed and their source may be overwritten.

        Args:
            arrays: each on one device of this process.

        Raises:
            LinkError: there is no memory for them.
            Exception: what computing them raised.
        """
        ...

    def fetch(self, offer: KVOffer, wanted: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[jax.Array]:
        """Bring the arrays of another process's offer onto this one's devices, and return them as they are there.

        Args:
            offer: of a link of the same kind; never one that was fetched before.
            wanted: for each array its shape, dtype and sharding, on one device; compared with the offer before
                anything moves.
            timeout: seconds after which it gives up.

        Raises:
            LinkError: something else is offered than wanted, the offer is gone, or the time was over.
        """
        ...

    def release(self, uuid: int) -> None:
        """Let go of an own offer that was fetched. Unknown uuids are ignored: messages may come twice."""
        ...

    def withdraw(self, uuid: int) -> None:
        """Let go of an own offer that nobody will fetch any more, or whose fetch failed; else like `release`."""
        ...

    def close(self) -> None:
        """Withdraw every offer and end the link. What others fetched from it, or it from others, stays valid."""
        ...


def check_offer(offer: KVOffer, kind: str, wanted: Sequence[jax.ShapeDtypeStruct]) -> None:
    """Compare what is offered with what is wanted, before anything is fetched.

    JAX 0.12.0.1 pulls another dtype of equal size as reinterpreted bits, without an error.

    Raises:
        LinkError: they differ in kind of link, number, dtype or shape.
    """
    if offer.link != kind:
        raise LinkError(f"offer {offer.uuid} is of a link by {offer.link}, and was to be fetched by {kind}.")
    if len(offer.parcels) != len(wanted):
        raise LinkError(f"offer {offer.uuid} has {len(offer.parcels)} arrays where {len(wanted)} are wanted.")
    for index, (parcel, want) in enumerate(zip(offer.parcels, wanted, strict=True)):
        if (parcel.dtype, parcel.shape) != (want.dtype.name, want.shape):
            raise LinkError(
                f"array {index} of offer {offer.uuid} is {parcel.dtype}{list(parcel.shape)}, and "
                f"{want.dtype.name}{list(want.shape)} is wanted: both workers need the same model and options."
            )


def new_uuid() -> int:
    """Draw the number of an offer, which nobody can guess and no other offer has."""
    return secrets.randbits(62)


def parcel_of(array: jax.Array, offset: int = 0) -> Parcel:
    """Describe an array that lies on one device."""
    return Parcel(array.dtype.name, array.shape, offset)
