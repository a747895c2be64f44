"""The state of a request on the device besides its KV: one row per slot.

There are few leaves, because every leaf of a step costs the host time on every device: scalars are columns of two
arrays, which every step takes and which move with the KV in a hand-off. A whole row is written when a request's last
chunk is dispatched, so no value of the slot's earlier request remains.

Dense rows, some bytes for each token of the vocabulary, are an array of their own. Only requests that use them
(`Flag.DENSE`) have them loaded, from the host, before their first step on a mesh; no hand-off carries them. For other
requests they hold the values of an earlier request and are not read.
"""

from enum import IntEnum, IntFlag
from typing import NamedTuple

import jax


class Float(IntEnum):
    """Columns of `Scalars.floats`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION_PENALTY = 3
    PRESENCE_PENALTY = 4
    FREQUENCY_PENALTY = 5


class Int(IntEnum):
    """Columns of `Scalars.ints`."""

    LAST_TOKEN = 0
    TOP_K = 1
    SEED = 2  # the bits of a uint32
    MIN_LEN = 3  # tokens, prompt included; a shorter sequence may not draw a stop token
    FLAGS = 4  # bits of `Flag`


class Flag(IntFlag):
    """Bits of `Int.FLAGS`."""

    DENSE = 1  # the request uses penalties, biases, bad words or a minimum length


class Seen(IntEnum):
    """Terms of the sum that `DenseRows.seen` holds for one token of the vocabulary: two bits and a count."""

    IN_PROMPT = 1  # bit: the token occurs in the prompt
    IS_STOP = 2  # bit: the token ends the request
    GENERATED = 4  # added once each time the token is generated


class Scalars(NamedTuple):
    """Per-request numbers of R rows. A row of zeros is greedy and uses nothing."""

    floats: jax.Array  # [R, len(Float)] float32
    ints: jax.Array  # [R, len(Int)] int32

    def has(self, flag: Flag) -> jax.Array:
        """Return which rows have a flag, [R] bool."""
        return (self.ints[:, Int.FLAGS] & int(flag)) > 0

    def at(self, slot: jax.Array) -> "Scalars":
        """Return the rows of these slots, [R]; for a slot past the last, those of some slot."""
        return Scalars(*(x.at[slot].get(mode="clip") for x in self))


class DenseRows(NamedTuple):
    """Per-request arrays of R rows, over the vocabulary and for bad words; `sampling_plan.py` defines their sizes."""

    seen: jax.Array  # [R, V] int32, see `Seen`
    bias: jax.Array  # [R, V] float32, added to the logits; -inf forbids
    bad_words: jax.Array  # [R, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS] int32, padded in front with -1; all -1: unused
    recent: jax.Array  # [R, MAX_BAD_WORD_TOKENS - 1] int32, tokens generated and fed last, newest last; -1: none


class DrawColumn(IntEnum):
    """Columns of the [R, len(DrawColumn)] int32 that say for which requests R rows of logits are."""

    SLOT = 0  # past the last slot: for none, and nothing is stored
    POSITION = 1  # of the token to be drawn, in its sequence
    FED = 2  # the token that the step fed; -1: none that has to be counted
