"""A link between processes of one host: arrays are written once into memory that the other process maps.

The memory is a memfd: it has no name in a file system, so nothing is left behind however a process dies, no resource
tracker watches it, and a container's small /dev/shm does not bound it. The other process opens it through
`/proc/PID/fd`, which takes the same user and PID namespace. On a CPU device the mapped pages are the array:
`device_put` of a buffer that starts at a multiple of 64 bytes copies nothing. Other platforms copy from it.

A block begins with a header that both sides see. The destination marks it free when its last array of the offer is
gone, and the source then writes the next offer into the same, warm memory; nothing waits for that. What a process had
taken that has died is free as well. A block withdrawn before it was taken is not written again: a late fetch may read.

Linux only. Not here: what is in the arrays (`parcels.py`).
"""

import fcntl
import itertools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import jax
import numpy as np

from ...protocol.offers import KVOffer, Parcel
from .link import LinkError, check_offer, new_uuid

KIND = "shared_memory"
_NAME = "twinmesh-kv"
_ALIGNMENT = 64  # bytes, from which on a CPU device takes a buffer as it is
_HEADER = 64  # bytes: int64 serial of the block, uuid of the offer, state, process that has taken it
_SERIAL, _UUID, _STATE, _TAKER = range(4)
_FREE, _OFFERED, _TAKEN, _CLOSED = range(4)
_UNIT = 2 << 20  # sizes of blocks are multiples, so that offers of about the same size share them
_MOST_MAPPED = 16  # blocks of others that stay mapped


class _Block:
    """Memory of this process that others can map."""

    def __init__(self, serial: int, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:
            os.close(self.fd)
            raise
        self.bytes = np.frombuffer(memory, np.uint8)
        self.header = self.bytes[:_HEADER].view(np.int64)
        self.header[:3] = serial, 0, _FREE

    @property
    def where(self) -> str:
        """Say how another process finds it."""
        return f"{os.getpid()}/{self.fd}/{self.header[_SERIAL]}"

    @property
    def is_free(self) -> bool:
        """Return whether nobody reads it: it was let go, or whoever had taken it has died."""
        state = self.header[_STATE]
        return bool(state == _FREE or (state == _TAKEN and not os.path.exists(f"/proc/{self.header[_TAKER]}")))

    def write(self, uuid: int, arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> None:
        """Copy arrays to these offsets, and say whose they are."""
        for array, offset in zip(arrays, offsets, strict=True):
            self.bytes[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        self.header[_UUID], self.header[_STATE] = uuid, _OFFERED

    def close(self) -> None:
        """Give the memory back, once nobody has it mapped."""
        self.header[_STATE] = _CLOSED
        os.close(self.fd)


class SharedMemoryLink:
    """Offers and fetches between processes of one host; a `Link`."""

    kind = KIND

    def __init__(self, idle_bytes: int = 1 << 30) -> None:
        """Keep up to `idle_bytes` of memory of past offers for the next ones.

        Raises:
            LinkError: the system has no memfd.
        """
        if not sys.platform.startswith("linux"):
            raise LinkError("memory is shared between processes by memfd, which Linux alone has.")
        self._lock = threading.Lock()
        self._serials = itertools.count(1)
        self._offered: dict[int, _Block] = {}
        self._idle: list[_Block] = []  # the most recent last
        self._idle_bytes = idle_bytes
        self._mapped: dict[str, mmap.mmap] = {}  # of others, by `_Block.where`; the most recent last

    @property
    def limits(self) -> tuple[str, ...]:
        """Say what it cannot do here."""
        if jax.default_backend() == "cpu":
            return ("shared memory joins processes of one host, one user and one PID namespace only.",)
        return ("shared memory takes KV of accelerators through the host's memory, by two more copies.",)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of own memory that offers and idle blocks take."""
        with self._lock:
            return sum(block.size for block in (*self._offered.values(), *self._idle))

    def offer(self, arrays: Sequence[jax.Array]) -> KVOffer:
        """Write arrays into memory that another process can map; see `Link.offer`."""
        for array in arrays:
            array.copy_to_host_async()
        parts = [np.asarray(array) for array in arrays]
        offsets, end = _lay_out(parts)
        uuid = new_uuid()
        block = self._take(end)
        block.write(uuid, parts, offsets)
        with self._lock:
            self._offered[uuid] = block
        parcels = tuple(Parcel(x.dtype.name, x.shape, at) for x, at in zip(parts, offsets, strict=True))
        return KVOffer(KIND, uuid, block.where, sum(x.nbytes for x in parts), parcels)

    def fetch(self, offer: KVOffer, wanted: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[jax.Array]:
        """Map another process's memory and put it on this one's devices; never waits, see `Link.fetch`."""
        check_offer(offer, KIND, wanted)
        memory = self._map(offer)
        base = np.frombuffer(memory, np.uint8)
        header = np.frombuffer(memory, np.int64, 4)
        if (header[_UUID], header[_STATE]) != (offer.uuid, _OFFERED):
            raise LinkError(f"offer {offer.uuid} was fetched or withdrawn: a retry is a new offer.")
        header[_TAKER] = os.getpid()
        header[_STATE] = _TAKEN
        weakref.finalize(base, _free, header).atexit = False
        views = [_view(base, parcel, want) for parcel, want in zip(offer.parcels, wanted, strict=True)]
        return [jax.device_put(view, want.sharding) for view, want in zip(views, wanted, strict=True)]

    def release(self, uuid: int) -> None:
        """Keep a fetched offer's memory for later ones; it is written once the other side has let go."""
        with self._lock:
            block = self._offered.pop(uuid, None)
            if block is not None:
                self._idle.append(block)
            surplus = self._surplus()
        for old in surplus:
            old.close()

    def withdraw(self, uuid: int) -> None:
        """Let go of an offer; unless it was fetched, with its memory, which whoever has mapped it may still read."""
        with self._lock:
            block = self._offered.get(uuid)
            if block is None or block.header[_STATE] != _OFFERED:
                block = None
            else:
                del self._offered[uuid]
        if block is None:
            self.release(uuid)
        else:
            block.close()

    def close(self) -> None:
        """Let go of all memory; arrays that were fetched stay valid."""
        with self._lock:
            blocks = [*self._offered.values(), *self._idle]
            self._offered, self._idle = {}, []
            self._mapped = {}
        for block in blocks:
            block.close()

    def _take(self, size: int) -> _Block:
        """Find or make a block of at least `size` bytes that nobody reads."""
        with self._lock:
            fitting = [x for x in self._idle if x.size >= size and x.is_free]
            block = min(fitting, key=lambda x: x.size, default=None)
            if block is not None:
                self._idle.remove(block)
                return block
            serial = next(self._serials)
        try:
            return _Block(serial, -(-size // _UNIT) * _UNIT)
        except OSError as error:
            raise LinkError(f"there is no memory for an offer of {size / 1e6:.0f} MB: {error.strerror}.") from None

    def _surplus(self) -> list[_Block]:
        """Take what exceeds the idle bytes out of the idle blocks, the oldest first."""
        over, surplus = sum(x.size for x in self._idle) - self._idle_bytes, []
        while over > 0 and self._idle:
            surplus.append(self._idle.pop(0))
            over -= surplus[-1].size
        return surplus

    def _map(self, offer: KVOffer) -> mmap.mmap:
        with self._lock:
            memory = self._mapped.pop(offer.where, None) or _open(offer)
            self._mapped[offer.where] = memory
            kept = [(x, m) for x, m in self._mapped.items() if x == offer.where or _is_alive(x, m)]
            self._mapped = dict(kept[-_MOST_MAPPED:])
        return memory


def _lay_out(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """Place arrays behind the header, each where a device takes it as it is; return the offsets and the end."""
    offsets, end = [], _HEADER
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _open(offer: KVOffer) -> mmap.mmap:
    """Map the block of an offer, if it is one: the process may be gone, and its number another's."""
    pid, fd, serial = offer.where.split("/")
    gone = LinkError(
        f"the memory of offer {offer.uuid} is not there: its process {pid} has ended or withdrawn it, or is of another "
        "host, user or PID namespace."
    )
    path = f"/proc/{pid}/fd/{fd}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise gone
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise gone from None
    try:
        memory = mmap.mmap(own, os.fstat(own).st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except (OSError, ValueError):
        raise gone from None
    finally:
        os.close(own)
    if np.frombuffer(memory, np.int64, 4)[_SERIAL] != int(serial):
        raise gone
    return memory


def _is_alive(where: str, memory: mmap.mmap) -> bool:
    """Return whether more offers may come in this memory."""
    pid, fd, _ = where.split("/")
    with suppress(OSError):
        is_there = os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"/memfd:{_NAME}")
        return is_there and bool(np.frombuffer(memory, np.int64, 4)[_STATE] != _CLOSED)
    return False


def _view(base: np.ndarray, parcel: Parcel, want: jax.ShapeDtypeStruct) -> np.ndarray:
    size = np.dtype(want.dtype).itemsize * int(np.prod(want.shape))
    if parcel.offset < _HEADER or parcel.offset + size > base.nbytes:
        raise LinkError(f"an array of the offer lies at {parcel.offset} of {base.nbytes} bytes, beyond its memory.")
    view: np.ndarray = base[parcel.offset : parcel.offset + size].view(want.dtype).reshape(want.shape)
    view.flags.writeable = False
    return view


def _free(header: np.ndarray) -> None:
    """Say that the last array is gone, unless the source has closed the block."""
    if header[_STATE] == _TAKEN:
        header[_STATE] = _FREE
