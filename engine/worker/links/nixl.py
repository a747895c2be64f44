"""A link by NVIDIA's NIXL, where it is installed (`pip install nixl`): memory of one process is read by the other.

NIXL takes addresses. The source registers the memory of the arrays as it is, and an offer carries the agent's metadata
and each address. The destination makes arrays, registers them and has their memory written before anybody else sees
them. Its `nixl` package installs torch as well; nothing here imports it.

NIXL reads whatever an address holds, also after its registration has ended, without an error. So each offer has a
stamp, a number in memory that lives as long as the link: its uuid while it is held, and 0 before its arrays are let go.
The destination reads it before and after them.

Tried with NIXL 1.5.1 on memory of the host (UCX); on GPUs it takes the same calls and was not run. One agent offers and
another fetches, so that a process can also fetch from itself.
"""

import base64
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...host.extras import need
from ...protocol.offers import KVOffer, Parcel
from .link import LinkError, check_offer, new_uuid

KIND = "nixl"
type Memory = tuple[int, int, int]  # address, bytes, device
_MOST_OFFERS = 4096  # that are held at the same time
_SHORTEST, _LONGEST = 50e-6, 2e-3  # seconds between two looks at a transfer


class NixlLink:
    """Offers and fetches by NIXL; a `Link`."""

    kind = KIND

    def __init__(self) -> None:
        """Make the agents.

        Raises:
            ValueError: NIXL is not installed.
            LinkError: it does not start here.
        """
        self._api = need("nixl._api", "nixl", "a link by NIXL")
        try:
            self._source, self._destination = self._agent(), self._agent()
        except Exception as error:
            raise LinkError(f"NIXL does not start here: {error}") from None
        self._lock = threading.Lock()  # an agent is for one thread at a time
        self._offered: dict[int, tuple[list[jax.Array], Any, int]] = {}
        self._stamps, self._stamp = np.zeros(_MOST_OFFERS, np.int64), np.zeros(1, np.int64)
        self._free = list(range(_MOST_OFFERS))
        for agent, memory in ((self._source, self._stamps), (self._destination, self._stamp)):
            agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")

    @property
    def limits(self) -> tuple[str, ...]:
        """Say what it cannot do here."""
        return ("NIXL was tried on memory of the host alone, not on that of GPUs.",)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of arrays that are offered."""
        with self._lock:
            return sum(x.nbytes for arrays, *_ in self._offered.values() for x in arrays)

    def offer(self, arrays: Sequence[jax.Array]) -> KVOffer:
        """Register arrays and keep them; see `Link.offer`. They must not be donated afterwards."""
        held = jax.block_until_ready(list(arrays))
        uuid, size = new_uuid(), sum(x.nbytes for x in held)
        with self._lock:
            if not self._free:
                raise LinkError(f"{_MOST_OFFERS} offers are held, which is the most that a link by NIXL has room for.")
            registered = self._register(self._source, held)
            slot = self._free.pop()
            self._offered[uuid] = held, registered, slot
            self._stamps[slot] = uuid
            stamp = self._stamps.ctypes.data + 8 * slot
            where = f"{stamp}/{base64.b85encode(self._source.get_agent_metadata()).decode()}"
        parcels = tuple(Parcel(x.dtype.name, x.shape, x.unsafe_buffer_pointer()) for x in held)
        return KVOffer(KIND, uuid, where, size, parcels)

    def fetch(self, offer: KVOffer, wanted: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[jax.Array]:
        """Read another process's memory into arrays of this one; see `Link.fetch`."""
        check_offer(offer, KIND, wanted)
        arrays: list[jax.Array] = jax.block_until_ready([_fresh(want) for want in wanted])
        theirs = [(parcel.offset, x.nbytes, _device(x)) for parcel, x in zip(offer.parcels, arrays, strict=True)]
        stamp, _, metadata = offer.where.partition("/")
        with self._lock:
            agent, kind, deadline = self._destination, _kind(arrays[0]), time.monotonic() + timeout
            registered = self._register(agent, arrays)
            try:
                peer = agent.add_remote_agent(base64.b85decode(metadata))
                self._check_stamp(offer, int(stamp), peer, deadline)
                ours = [_memory(x) for x in arrays]
                self._read(ours, theirs, kind, peer, offer, deadline)
                self._check_stamp(offer, int(stamp), peer, deadline)
            except LinkError:
                raise
            except Exception as error:
                raise LinkError(f"offer {offer.uuid} could not be read by NIXL: {error}") from None
            finally:
                agent.deregister_memory(registered)
        return arrays

    def _check_stamp(self, offer: KVOffer, address: int, peer: Any, deadline: float) -> None:
        ours = [(self._stamp.ctypes.data, 8, 0)]
        self._read(ours, [(address, 8, 0)], "DRAM", peer, offer, deadline)
        if self._stamp[0] != offer.uuid:
            raise LinkError(f"offer {offer.uuid} was withdrawn: a retry is a new offer.")

    def release(self, uuid: int) -> None:
        """Let go of an own offer that was fetched."""
        self.withdraw(uuid)

    def withdraw(self, uuid: int) -> None:
        """Let go of an own offer; who still reads it fails."""
        with self._lock:
            if (offered := self._offered.pop(uuid, None)) is not None:
                _, registered, slot = offered
                self._stamps[slot] = 0
                self._free.append(slot)
                self._source.deregister_memory(registered)

    def close(self) -> None:
        """Let go of every offer."""
        for uuid in list(self._offered):
            self.withdraw(uuid)

    def _agent(self) -> Any:
        return self._api.nixl_agent(f"twinmesh-{new_uuid()}", self._api.nixl_agent_config(backends=["UCX"]))

    def _register(self, agent: Any, arrays: Sequence[jax.Array]) -> Any:
        return agent.register_memory([(*_memory(x), "") for x in arrays], _kind(arrays[0]))

    def _read(
        self, ours: list[Memory], theirs: list[Memory], kind: str, peer: Any, offer: KVOffer, deadline: float
    ) -> None:
        """Have memory of the other agent written into memory of this one, and wait for it."""
        agent, pause = self._destination, _SHORTEST
        local, remote = agent.get_xfer_descs(ours, kind), agent.get_xfer_descs(theirs, kind)
        handle = agent.initialize_xfer("READ", local, remote, peer)
        try:
            state = agent.transfer(handle)
            while state == "PROC":
                if time.monotonic() > deadline:
                    raise LinkError(f"offer {offer.uuid} did not arrive by NIXL in time.")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
                state = agent.check_xfer_state(handle)
        finally:
            agent.release_xfer_handle(handle)
        if state != "DONE":
            raise LinkError(f"offer {offer.uuid} could not be read by NIXL: its transfer ended as {state}.")


def _fresh(want: jax.ShapeDtypeStruct) -> jax.Array:
    """Make an array whose memory nobody else has."""
    made: jax.Array = jax.jit(lambda: jnp.zeros(want.shape, want.dtype), out_shardings=want.sharding)()
    return made


def _device(array: jax.Array) -> int:
    (device,) = array.devices()
    return 0 if device.platform == "cpu" else int(device.id)


def _memory(array: jax.Array) -> Memory:
    return array.unsafe_buffer_pointer(), array.nbytes, _device(array)


def _kind(array: jax.Array) -> str:
    (device,) = array.devices()
    return "DRAM" if device.platform == "cpu" else "VRAM"
