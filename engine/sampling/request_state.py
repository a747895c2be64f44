"""The state of a request on the device besides KV: one row per slot, moved with the KV in a hand-off.

Few leaves, because every leaf of a step costs the host time on every device: scalars are columns of two arrays. A row
is written whole when a request's last chunk is dispatched, so nothing of a slot's earlier request survives.

The dense rows (`seen`, `bias`, `bad_words`) are loaded by a program of their own, and only for requests that use them
(`Flag.DENSE`); for others they hold what an earlier request left, and are not read.
"""

from enum import IntEnum, IntFlag
from typing import NamedTuple

import jax


class Float(IntEnum):
    """Columns of `floats`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION_PENALTY = 3
    PRESENCE_PENALTY = 4
    FREQUENCY_PENALTY = 5


class Int(IntEnum):
    """Columns of `ints`. SEED holds the bits of a uint32. MIN_LEN: sequences shorter than this may not be stopped."""

    LAST_TOKEN = 0
    TOP_K = 1
    SEED = 2
    MIN_LEN = 3
    FLAGS = 4


class Flag(IntFlag):
    """Bits of `Int.FLAGS`. DENSE: penalties, biases, bad words or a minimum length. LOGPROBS: report them."""

    DENSE = 1
    LOGPROBS = 2


class Seen(IntEnum):
    """What `seen` adds up for one token of the vocabulary: bits, and a count of how often it was generated."""

    IN_PROMPT = 1
    IS_STOP = 2
    GENERATED = 4


class Scalars(NamedTuple):
    """Per-request numbers of R rows. A row of zeros is greedy and uses nothing."""

    floats: jax.Array  # [R, len(Float)] float32
    ints: jax.Array  # [R, len(Int)] int32

    def has(self, flag: Flag) -> jax.Array:
        """Which rows have a flag, [R] bool."""
        return (self.ints[:, Int.FLAGS] & int(flag)) > 0


class DenseRows(NamedTuple):
    """Per-request arrays over the vocabulary and for bad words, of R rows; the sizes are `sampling_plan.py`'s."""

    seen: jax.Array  # [R, V] int32, see `Seen`
    bias: jax.Array  # [R, V] float32, added to the logits; -inf forbids
    bad_words: jax.Array  # [R, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS] int32, padded in front with -1; all -1: unused
    recent: jax.Array  # [R, MAX_BAD_WORD_TOKENS - 1] int32, tokens generated and fed last, newest last; -1: none


class RequestState(NamedTuple):
    """All slots of a mesh: `scalars` and `dense` with R = max_num_seqs rows."""

    scalars: Scalars
    dense: DenseRows
