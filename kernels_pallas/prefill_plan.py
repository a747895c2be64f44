"""What the producer and the consumers of the Hopper prefill kernel share: sizes, shared memory, barriers, the work.

Not here: what they do, `prefill_producer.py` and `prefill_block.py`.
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

ROWS = CONSUMERS * WARPGROUP_ROWS  # of a piece of work
DESCRIPTION = 32  # integers of a piece: 128 bytes, because tensor copies begin at multiples of that in shared memory


@dataclass(frozen=True)
class Plan:
    """The static parameters of a call."""

    query_heads: int
    group: int  # query heads per key/value head
    head_dim: int
    page_size: int
    tile: int  # tokens of a tile
    stages: int  # tiles in the ring
    blocks: int  # thread blocks
    window: int | None
    has_sink: bool
    softmax: Softmax
    interpret: bool  # whether the kernel runs in the interpreter on the CPU
    quantized: tuple[Any, Any] | None = None  # dtypes of keys and values of 8 bits; None: they are floats

    @property
    def registers(self) -> tuple[int, int]:
        """Return registers per consumer's and per producer's thread, 504 of 512 in all; the producer's do not spill."""
        if self.quantized is not None:
            return (208, 88)
        return (224, 56) if self.head_dim == 64 else (232, 40)

    @property
    def staged(self) -> int:
        """Return how many columns of a result are copied to global memory at a time."""
        return 64 if self.head_dim > 128 else self.head_dim


class Buffers(NamedTuple):
    """The buffers in shared memory."""

    q: Ref  # [consumers, 64, D]
    k: Ref  # [stages, tile, D]
    v: Ref  # [stages, tile, D]
    out: Ref  # [consumers, 64, staged]
    weights: Ref | None  # [consumers, 64, tile], for the interpreter; None on a GPU
    pieces: Ref  # [2, consumers, DESCRIPTION], of this piece of work and the next
    raw: RawBuffers | None  # of 8-bit tiles


class Barriers(NamedTuple):
    """The barriers: a buffer or slot is full once the copy has arrived, and free once all its readers are done."""

    q_full: Ref
    q_free: Ref
    k_full: Ref
    k_free: Ref
    v_copied: Ref  # for the producer, before it zeroes values that it has copied
    v_full: Ref
    v_free: Ref
    turn: Ref
    raw_full: Ref | None


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block."""
    stages, per_consumer = plan.stages, (CONSUMERS, WARPGROUP_ROWS)
    raw, raw_full = None, None
    if plan.quantized is not None:
        raw, raw_full = quantized_page_tiles.scratch(plan.tile, plan.head_dim, plan.quantized, plan.page_size)
    buffers = Buffers(
        q=smem((*per_consumer, plan.head_dim), dtype),
        k=smem((stages, plan.tile, plan.head_dim), dtype),
        v=smem((stages, plan.tile, plan.head_dim), dtype),
        out=plgpu.SMEM((*per_consumer, plan.staged), dtype),
        weights=smem((*per_consumer, plan.tile), dtype) if plan.interpret else None,
        pieces=plgpu.SMEM((2, CONSUMERS, DESCRIPTION), jnp.int32),
        raw=raw,
    )
    copies = 1 if plan.quantized else copies_per_tile(plan.tile, plan.page_size)
    barriers = Barriers(
        q_full=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        q_free=plgpu.Barrier(num_barriers=CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        k_free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        v_copied=plgpu.Barrier(num_arrivals=copies),
        v_full=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        v_free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
        raw_full=raw_full,
    )
    return buffers, barriers


@dataclass(frozen=True)
class Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    q: Ref  # [T, Hq, D]
    k_pages: Ref  # [N, P, Hk, D]
    v_pages: Ref
    page_table: Ref  # [R, max_pages]
    first_page: Ref  # [1]
    pieces: Ref  # [U, DESCRIPTION]
    sinks: Ref  # [Hq]
    tokens: tuple[Ref, ...]  # the scales of keys' and values' tokens, [N, Hk, P] each, if they have 8 bits
    out: Ref  # [T, Hq, D], written
    smem: Buffers
    barriers: Barriers
    number: Array  # of the block
    total: Array  # pieces of work of all blocks

    @property
    def mine(self) -> Array:
        """Return the number of pieces of work of this block."""
        rounds = lax.div(self.total + (self.plan.blocks - 1), self.plan.blocks)
        return jnp.maximum(rounds - jnp.where(self._at(rounds - 1) < self.total, 0, 1), 0)

    def place(self, i: Array) -> tuple[Array, Array]:
        """Find the row of `pieces` and the query head of the block's i-th piece."""
        at = self._at(i)
        return lax.div(at, self.plan.query_heads), lax.rem(at, self.plan.query_heads)

    def _at(self, i: Array) -> Array:
        """Number the block's i-th piece among all pieces; odd rounds go over the blocks in reverse."""
        forth = lax.rem(i, 2) == 0
        return i * self.plan.blocks + jnp.where(forth, self.number, self.plan.blocks - 1 - self.number)

    def take_turn(self) -> None:
        """Wait until the other consumer reaches the same point."""
        plgpu.barrier_arrive(self.barriers.turn)
        plgpu.barrier_wait(self.barriers.turn)
