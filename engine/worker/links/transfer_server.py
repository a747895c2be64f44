"""A link between hosts: JAX's transfer server holds arrays under a uuid, and the other process pulls them over TCP.

What jax 0.11.2 and 0.12.0.1 do not do, and how this file lives with it:

- A pull whose peer is silent, or whose uuid is unknown or was pulled before, never ends, whatever `timeout=` it is
  given, and a thread that waits for it cannot be ended either: at exit the process would crash in it. So a fetch looks
  whether its arrays are ready, at intervals far shorter than a transfer, until its own time is over.
- An offer that nobody pulls cannot be taken back. The memory goes with the server, once no connection to it is left. So
  a fetch has a connection of its own (which takes no longer than to keep one), and a server that holds withdrawn offers
  is replaced: at once if nothing else is offered there, else for new offers as soon as it holds `idle_bytes` of them.
- A server that is dropped before it has served leaks its socket, and a connection that is dropped before its pull ends
  can take the process with it. So a server pulls a byte from itself first, which also shows that it works, and what a
  fetch leaves on its way is kept until it has arrived or failed.
- Arrays of another dtype and equal size arrive as reinterpreted bits: `check_offer`.

Anyone who reaches the port and knows a uuid can pull what it stands for: uuids are drawn at random, and a network that
others use needs a firewall.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import jax
import numpy as np
from jax.experimental import transfer

from ...protocol.offers import KVOffer
from .link import LinkError, check_offer, new_uuid, parcel_of

KIND = "transfer_server"
_STREAMS = 4  # connections that carry one pull's arrays at the same time
_SHORTEST, _LONGEST = 50e-6, 2e-3  # seconds between two looks at what is on its way
_START_SECONDS = 10.0  # until a server that answers at all has answered itself


@dataclass
class _Server:
    """One server and what is held there."""

    server: Any
    offered: dict[int, int] = field(default_factory=dict)  # uuid -> bytes
    withdrawn: int = 0  # bytes that nobody will pull


class TransferServerLink:
    """Offers and fetches by JAX's transfer server; a `Link`."""

    kind = KIND

    def __init__(self, host: str, idle_bytes: int = 1 << 28) -> None:
        """Start a server.

        Args:
            host: the address of this machine at which other workers reach it, such as "10.0.0.7".
            idle_bytes: of withdrawn offers that a server may hold while others are still offered there.

        Raises:
            LinkError: this host has no such address, or this jax no transfer server.
        """
        self._host, self._idle_bytes = host, idle_bytes
        self._client = jax.local_devices()[0].client
        self._lock = Lock()
        self._late: list[tuple[Any, list[Any]]] = []  # a connection, and the arrays that are still on their way
        self._current: _Server | None = self._start()
        self._servers = [self._current]  # also earlier ones, until what they offer is fetched or withdrawn
        # Pulls through a server of its own: to end a server of offers must not end them.
        self._puller = self._start().server

    @property
    def limits(self) -> tuple[str, ...]:
        """Say what it cannot do here."""
        return (
            f"jax {jax.__version__}'s transfer server goes through TCP and is not encrypted: KV crosses the network at "
            "about a gigabyte per second.",
        )

    @property
    def held_bytes(self) -> int:
        """Return the bytes of arrays that servers hold, withdrawn ones among them."""
        with self._lock:
            return sum(sum(server.offered.values()) + server.withdrawn for server in self._servers)

    def offer(self, arrays: Sequence[jax.Array]) -> KVOffer:
        """Hold arrays ready to be pulled; see `Link.offer`. They must not be donated afterwards."""
        arrays = jax.block_until_ready(list(arrays))
        uuid, size = new_uuid(), sum(x.nbytes for x in arrays)
        with self._lock:
            if self._current is None:
                self._current = self._start()
                self._servers.append(self._current)
            server = self._current
            server.server.await_pull(uuid, arrays)
            server.offered[uuid] = size
        return KVOffer(KIND, uuid, server.server.address(), size, tuple(map(parcel_of, arrays)))

    def fetch(self, offer: KVOffer, wanted: Sequence[jax.ShapeDtypeStruct], timeout: float) -> list[jax.Array]:
        """Pull an offer; see `Link.fetch`. What arrives after the time is over is dropped."""
        check_offer(offer, KIND, wanted)
        try:
            connection = self._puller.connect(offer.where)
            arrays: list[jax.Array] = connection.pull(offer.uuid, list(wanted))
            if self._is_there(connection, arrays, timeout):
                arrays = jax.block_until_ready(arrays)  # raises what made them fail
                return arrays
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise LinkError(f"offer {offer.uuid} could not be pulled from {offer.where}: {reason}") from None
        raise LinkError(f"offer {offer.uuid} did not arrive from {offer.where} within {timeout:g} s.")

    def _is_there(self, connection: Any, arrays: list[jax.Array], timeout: float) -> bool:
        """Wait for arrays to arrive or fail; where the time is over before, keep what they need to end in peace."""
        is_there = _wait(arrays, timeout)
        with self._lock:
            self._late = [(of, them) for of, them in self._late if not all(x.is_ready() for x in them)]
            if not is_there:
                self._late.append((connection, arrays))
        return is_there

    def release(self, uuid: int) -> None:
        """Forget an own offer that was fetched: the server has let go of it by itself."""
        self._end(uuid, was_fetched=True)

    def withdraw(self, uuid: int) -> None:
        """Give up an own offer, and the server that holds it as soon as that disturbs no other."""
        self._end(uuid, was_fetched=False)

    def close(self) -> None:
        """End the servers, and with them what is still offered."""
        with self._lock:
            self._servers, self._current = [], None
            self._puller, self._late = None, []

    def _start(self) -> _Server:
        address = f"[{self._host}]:0" if ":" in self._host else f"{self._host}:0"
        try:
            server = transfer.start_transfer_server(self._client, address, [address] * _STREAMS)
            if not _serves(server):
                raise RuntimeError(f"it does not answer within {_START_SECONDS:g} s.")
            return _Server(server)
        except (RuntimeError, ValueError) as error:
            raise LinkError(
                f"jax's transfer server does not start at {self._host}: {str(error).splitlines()[0]}"
            ) from None

    def _end(self, uuid: int, *, was_fetched: bool) -> None:
        with self._lock:
            server = next((x for x in self._servers if uuid in x.offered), None)
            if server is None:
                return
            size = server.offered.pop(uuid)
            server.withdrawn += 0 if was_fetched else size
            is_idle = not server.offered
            if server is self._current and server.withdrawn > (0 if is_idle else self._idle_bytes):
                self._current = None
            if is_idle and server is not self._current:
                self._servers.remove(server)


def _wait(arrays: Sequence[Any], timeout: float) -> bool:
    """Wait until arrays have arrived or failed; return False if the time, in seconds, is over before."""
    pause, deadline = _SHORTEST, time.monotonic() + timeout
    for array in arrays:
        while not array.is_ready():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
    return True


def _serves(server: Any) -> bool:
    """Pull a byte from a server through itself."""
    byte = jax.device_put(np.zeros(1, np.uint8), jax.local_devices()[0])
    server.await_pull(1, [byte])
    connection = server.connect(server.address())
    pulled = connection.pull(1, [jax.ShapeDtypeStruct(byte.shape, byte.dtype, sharding=byte.sharding)])
    return _wait(pulled, _START_SECONDS)
