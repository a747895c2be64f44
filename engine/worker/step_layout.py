"""The columns in which the host describes a step to the device."""

from enum import IntEnum
from typing import NamedTuple

import jax

from ..sampling.request_state import Int


class ChunkColumn(IntEnum):
    """The first columns of `PrefillInputs.rows`."""

    SLOT = 0
    LENGTH = 1
    KV_LEN = 2
    WRITE_FROM = 3
    IS_LAST = 4  # whether the row samples; if not, its `Scalars.ints` and floats are 0


class DecodeColumn(IntEnum):
    """The first columns of a decode step's rows."""

    SLOT = 0
    KV_LEN = 1
    FORCED = 2  # the token to feed first; -1: the one sampled last


class PrefillInputs(NamedTuple):
    """One packed prefill step, as the host lays it out.

    The columns of `rows` are those of `ChunkColumn`, the request's `Scalars.ints`, and its page table in each group.
    """

    tokens: jax.Array  # [T] int32, the rows' chunks, one after the other
    rows: jax.Array  # [R, len(ChunkColumn) + len(Int) + G * M] int32
    floats: jax.Array  # [R, len(Float)] float32, the request's `Scalars.floats`


def prefill_columns(num_groups: int, max_pages: int) -> int:
    """Count the columns of `PrefillInputs.rows`."""
    return len(ChunkColumn) + len(Int) + num_groups * max_pages


def pages_written(steps: int, page_size: int) -> int:
    """Return the most pages of a group that so many decode steps of one request write to."""
    return (steps + page_size - 2) // page_size + 1


def decode_columns(num_groups: int, steps: int, page_size: int) -> int:
    """Count the columns of a decode step's rows.

    They are those of `DecodeColumn`, then for each group the pages that the steps write to, from the page of position
    kv_len - 1 on.
    """
    return len(DecodeColumn) + num_groups * pages_written(steps, page_size)
