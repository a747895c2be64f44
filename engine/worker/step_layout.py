"""The columns in which the host describes a step to the device."""

from enum import IntEnum
from typing import NamedTuple

import jax

from ..sampling.request_state import Int


class ChunkColumn(IntEnum):
    """First columns of `PrefillInputs.rows`. IS_LAST: whether the row samples; else its `ints` and floats are 0."""

    SLOT = 0
    LENGTH = 1
    KV_LEN = 2
    WRITE_FROM = 3
    IS_LAST = 4


class DecodeColumn(IntEnum):
    """First columns of a decode step's rows. FORCED: the token to feed first; -1: the one sampled last."""

    SLOT = 0
    KV_LEN = 1
    FORCED = 2


class PrefillInputs(NamedTuple):
    """One packed prefill step, as the host lays it out.

    `tokens` [T]: the rows' chunks, one after the other. `rows` [R, len(ChunkColumn) + len(Int) + G * M] int32: the
    columns of `ChunkColumn`, the request's `Scalars.ints`, its page table in each group. `floats` [R, len(Float)].
    """

    tokens: jax.Array
    rows: jax.Array
    floats: jax.Array


def prefill_columns(num_groups: int, max_pages: int) -> int:
    """Columns of `PrefillInputs.rows`."""
    return len(ChunkColumn) + len(Int) + num_groups * max_pages


def pages_written(steps: int, page_size: int) -> int:
    """The most pages of a group that so many decode steps of one request write to."""
    return (steps + page_size - 2) // page_size + 1


def decode_columns(num_groups: int, steps: int, page_size: int) -> int:
    """Columns of a decode step's rows: those of `DecodeColumn`, then each group's pages that the steps write to, from
    the page of position kv_len - 1 on."""
    return len(DecodeColumn) + num_groups * pages_written(steps, page_size)
