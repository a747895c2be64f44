"""What a source says of KV that another process may fetch: plain data, small whatever the KV is.

It crosses between workers by way of the driver, which reads nothing of it but `link` and `uuid`. What stands behind
`where` is the link's own affair (`engine/worker/links`).
"""

from collections.abc import Iterable

from .message import Message, Row


class Parcel(Row, frozen=True):
    """One array of an offer, as it lies on one device."""

    dtype: str  # numpy's name, such as "bfloat16"
    shape: tuple[int, ...]
    offset: int = 0  # where it begins in the offered memory, in bytes; 0 where the link counts arrays


class KVOffer(Message, frozen=True):
    """Pages and scalars of one request that a source holds ready until they are fetched, once, or withdrawn.

    The parcels are in the order of `worker/links/parcels.py`: slice by slice of heads, then the scalars.
    """

    link: str  # the kind of link, by which the destination chooses the other end
    uuid: int  # of this offer alone, at its source; a retry is a new offer
    where: str  # how its link finds it
    nbytes: int  # of all arrays
    parcels: tuple[Parcel, ...]
    # Where the meshes span processes, the offers of all those of the source, in the order of `ends_between`; then there
    # is nothing else here.
    parts: tuple["KVOffer", ...] = ()


def joined(offers: Iterable[KVOffer]) -> KVOffer:
    """Make one offer of several, of those that have parts of these."""
    parts = tuple(part for offer in offers for part in offer.parts or (offer,))
    link = parts[0].link if parts else ""
    return KVOffer(link, 0, "", sum(part.nbytes for part in parts), (), parts)
