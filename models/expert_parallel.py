"""Experts divided over devices: rows go to the devices that have their experts, and the results come back.

Under `shard_map` over a mesh [ep, columns]: N groups of devices have X / N whole experts each, or of these a device's
columns. Activations are the same on every device, as attention leaves them, so each of the N takes its share of the
rows: it sends every row to the devices of its experts, which multiply and send back, adds up by weight and gives the
sums to all. A row is computed once, and what it becomes is what it becomes on one device, to the last bit where an
expert's columns are not divided: rows change places, and no order of sums changes.

Two forms of one exchange, alike in where rows lie. XLA's CPU backend has no `ragged_all_to_all`, so there it is a dense
`all_to_all`, in which a device has room for all rows of another; everywhere else only the rows are sent that there are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..kernels_pallas.dispatch import runs_on_cpu
from ..kernels_pallas.grouped import group

# From rows [R, E] and the expert of each [R, 1], of those that this device has or one past them, to [R, 1, n] float32.
type Experts = Callable[[jax.Array, jax.Array], jax.Array]


class Parts(NamedTuple):
    """The axis that experts are divided over."""

    axis: str
    groups: int  # N
    experts: int  # X, of all devices


def exchanged(x: jax.Array, chosen: jax.Array, parts: Parts, run: Experts) -> jax.Array:
    """Compute the chosen experts for this device's share of the rows.

    Args:
        x: [T, E] of this share.
        chosen: [T, K] int32 up to X, which means none.
        parts: of the experts.
        run: this device's experts.

    Returns:
        [T, K, n] float32; where a row has chosen none, anything.
    """
    places, each = group(chosen, parts.experts), parts.experts // parts.groups
    most = places.rows.shape[0]  # rows that may go to one device
    sizes = jax.lax.all_gather(places.sizes.reshape(parts.groups, each), parts.axis)  # [from, to, experts of one]
    sent, rank = jnp.sum(sizes, axis=2, dtype=jnp.int32), jax.lax.axis_index(parts.axis)
    starts = jnp.cumsum(sent[rank], dtype=jnp.int32) - sent[rank]
    arrived = _exchange(x[places.rows], starts, sent, most, parts)
    done = run(arrived, _expert_of(sizes[:, rank], most)[:, None])[:, 0]
    back = _exchange(done, jnp.arange(parts.groups, dtype=jnp.int32) * most, sent.T, most, parts)
    device = jnp.minimum(chosen // each, parts.groups - 1)
    return back.at[device * most + places.places - starts[device]].get(mode="clip")


def _expert_of(sizes: jax.Array, most: int) -> jax.Array:
    """Find the expert of each row that has arrived, `most` from each device: [N * most]; past them: none.

    `sizes` [N, X / N] are the rows that each device has sent for each expert, which lie in this order.
    """
    ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)
    place = jnp.arange(most, dtype=jnp.int32)
    return jnp.sum(ends[:, None] <= place[:, None], axis=2, dtype=jnp.int32).reshape(-1)


def _exchange(rows: jax.Array, starts: jax.Array, sent: jax.Array, most: int, parts: Parts) -> jax.Array:
    """Send runs of rows [M, n] to every device; those of device d arrive at row d * most: [N * most, n].

    Args:
        rows: of this device.
        starts: [N], where the run for each device begins.
        sent: [N, N], the length of the run from each device to each device.
        most: no run is longer.
        parts: whose axis the devices lie on.
    """
    if runs_on_cpu():
        index = starts[:, None] + jnp.arange(most, dtype=jnp.int32)
        blocks = rows.at[index].get(mode="clip")  # what follows a run goes with it, and nobody looks
        received: jax.Array = jax.lax.all_to_all(blocks, parts.axis, 0, 0)
        return received.reshape(parts.groups * most, rows.shape[1])
    rank = jax.lax.axis_index(parts.axis)
    room = jnp.zeros((parts.groups * most, rows.shape[1]), rows.dtype)
    places = jnp.full(parts.groups, rank * most, jnp.int32)
    arrived: jax.Array = jax.lax.ragged_all_to_all(
        rows, room, starts, sent[rank], places, sent[:, rank], axis_name=parts.axis
    )
    return arrived
