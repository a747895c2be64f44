"""What the producer and the consumers of the Hopper decode kernel share: sizes, shared memory, barriers, the work.

Not here: what they do, `decode_producer.py` and `decode_block.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import quantized_page_tiles
from .mosaic import CONSUMERS, WARPGROUP_ROWS, Ref, Softmax, copies_per_tile, smem
from .quantized_page_tiles import RawBuffers
from .work import ceil_div

TILE = 64  # tokens
STAGED = 32  # columns of a partial sum that are copied to global memory at a time


@dataclass(frozen=True)
class Plan:
    """The static parameters of a call."""

    kv_heads: int
    group: int  # query heads per key/value head
    head_dim: int
    page_size: int
    stages: int  # tiles in each ring
    blocks: int  # thread blocks
    softmax: Softmax
    interpret: bool  # whether the kernel runs in the interpreter on the CPU
    quantized: tuple[Any, Any] | None = None  # dtypes of keys and values of 8 bits; None: they are floats

    @property
    def rows(self) -> int:
        """Return the rows of q per key/value head, rounded up to whole tiles of shared memory."""
        return ceil_div(self.group, 8) * 8

    @property
    def stored(self) -> int:
        """Return the rows of partial sums per key/value head; four logarithms are 16 bytes, the least to copy."""
        return ceil_div(self.group, 4) * 4

    @property
    def halves(self) -> bool:
        """Return whether the consumers divide the columns of a tile between them, rather than the tiles of a split."""
        return self.head_dim > 128

    @property
    def rings(self) -> int:
        """Return the number of rings in shared memory, which is also that of partial sums per split."""
        return 1 if self.halves else CONSUMERS

    @property
    def columns(self) -> int:
        """Return the columns of one consumer's accumulator."""
        return self.head_dim // 2 if self.halves else self.head_dim


class Buffers(NamedTuple):
    """The buffers in shared memory."""

    q: Ref  # [2, 64, D], of this piece of work and the next
    k: Ref  # [slots, tile, D], the slots of a ring next to each other
    v: Ref  # [slots, tile, D]
    sums: Ref  # [consumers, 64, staged]
    logs: Ref  # [consumers, 64]
    weights: Ref | None  # [consumers, 64, tile], for the interpreter; None on a GPU
    raw: RawBuffers | None  # of 8-bit tiles


class Barriers(NamedTuple):
    """The barriers: a buffer or slot is full once the copy has arrived, and free once all its readers are done."""

    q_full: Ref
    q_free: Ref
    k_full: Ref
    v_full: Ref
    free: Ref
    raw_full: Ref | None


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block."""
    slots, per_consumer = plan.rings * plan.stages, (CONSUMERS, WARPGROUP_ROWS)
    raw, raw_full = None, None
    if plan.quantized is not None:
        raw, raw_full = quantized_page_tiles.scratch(TILE, plan.head_dim, plan.quantized, plan.page_size)
    buffers = Buffers(
        q=smem((2, WARPGROUP_ROWS, plan.head_dim), dtype),
        k=smem((slots, TILE, plan.head_dim), dtype),
        v=smem((slots, TILE, plan.head_dim), dtype),
        sums=plgpu.SMEM((*per_consumer, STAGED), jnp.float32),
        logs=plgpu.SMEM(per_consumer, jnp.float32),
        weights=smem((*per_consumer, TILE), dtype) if plan.interpret else None,
        raw=raw,
    )
    copies = 1 if plan.quantized else copies_per_tile(TILE, plan.page_size)
    barriers = Barriers(
        q_full=plgpu.Barrier(num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2, num_arrivals=CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=slots, num_arrivals=copies),
        v_full=plgpu.Barrier(num_barriers=slots, num_arrivals=copies),
        free=plgpu.Barrier(num_barriers=slots, num_arrivals=CONSUMERS if plan.halves else 1),
        raw_full=raw_full,
    )
    return buffers, barriers


class Item(NamedTuple):
    """One piece of work: one key/value head of one split of one request."""

    split: Array
    head: Array
    request: Array
    begin: Array  # the first visible token
    end: Array  # the token after the last visible one

    @property
    def base(self) -> Array:
        """Return the first token of its first tile."""
        return lax.div(self.begin, TILE) * TILE

    @property
    def tiles(self) -> Array:
        """Count its tiles."""
        return lax.div(self.end + (TILE - 1), TILE) - lax.div(self.begin, TILE)

    def share(self, ring: Array | int, rings: int) -> Array:
        """Count the tiles that go through a ring."""
        return lax.div(self.tiles - ring + (rings - 1), rings)


@dataclass(frozen=True)
class Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    q: Ref  # [R, Hk, rows, D]
    k_pages: Ref  # [N, P, Hk, D]
    v_pages: Ref
    page_table: Ref  # [R, max_pages]
    first_page: Ref  # [1]
    items: Ref  # [U, 3]
    tokens: tuple[Ref, ...]  # the scales of keys' and values' tokens, [N, Hk, P] each, if they have 8 bits
    sums: Ref  # [U, rings, Hk, stored, D], written
    logs: Ref  # [U, rings, Hk, stored], written
    smem: Buffers
    barriers: Barriers
    number: Array  # of the block
    total: Array  # pieces of work of all blocks

    @property
    def mine(self) -> Array:
        """Return the number of pieces of work of this block."""
        return lax.div(self.total - self.number + (self.plan.blocks - 1), self.plan.blocks)

    def item(self, i: Array) -> Item:
        """Return the block's i-th piece; past the end, the last of all pieces."""
        index = jnp.minimum(self.number + i * self.plan.blocks, self.total - 1)
        split = lax.div(index, self.plan.kv_heads)
        request, begin, end = (self.items[split, column] for column in range(3))
        return Item(split, lax.rem(index, self.plan.kv_heads), request, begin, end)

    def slot(self, ring: Array | int, use: Array) -> Array:
        """Find the slot of the `use`-th tile that goes through a ring."""
        return ring * self.plan.stages + lax.rem(use, self.plan.stages)
