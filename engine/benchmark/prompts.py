"""Token ids for a workload's prompts, which has none: made up, and the same wherever the workload says that they are.

A block of the workload stands for the same tokens in every prompt that has it. A later turn of a conversation begins
with the prompt and the answer before it, as the engine gave it: what the block ids that go on over the answer stand for
is known only when it is there. Pure functions of seed and workload, but for those answers.

A token is a hash of its block and its place there (SplitMix64, Steele et al. 2014), so a prompt of any length takes one
pass of numpy.
"""

from collections.abc import Iterable

import numpy as np

from ..simulation.workload import WorkRequest

_LEAST_ID = 3  # of made-up tokens: those before are special in most vocabularies
_BLOCKS, _ALONE = 0, 1  # streams: of blocks, and of prompts that share nothing
_MASK = 2**64 - 1
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Prompts:
    """Makes the prompts of one workload."""

    def __init__(self, vocabulary: int, block_tokens: int, seed: tuple[int, ...] = (0,)) -> None:
        """Make tokens from a vocabulary of so many; a workload's block has `block_tokens`. Prompts of another seed
        share nothing with these."""
        self._vocabulary, self._block_tokens = vocabulary, block_tokens
        self._streams = [_hashed(*seed, stream) for stream in (_BLOCKS, _ALONE)]

    def ids(self, number: int, work: WorkRequest, before: np.ndarray | None = None) -> np.ndarray:
        """Return the prompt of request `number`, [prompt_len] int32.

        `before` [n] int32 are the tokens of the turn before it, prompt and answer, if it goes on with one.
        """
        own = self._own(number, work)
        if before is None:
            return own
        kept = before[: work.prompt_len]
        return np.concatenate([kept, own[len(kept) :]])

    def _own(self, number: int, work: WorkRequest) -> np.ndarray:
        length = work.prompt_len
        shared = self._drawn(_BLOCKS, work.blocks, self._block_tokens).ravel()
        rest = length - len(shared)
        if rest <= 0:
            return shared[:length]
        return np.concatenate([shared, self._drawn(_ALONE, (number,), rest).ravel()])

    def _drawn(self, stream: int, keys: Iterable[int], count: int) -> np.ndarray:
        """Draw `count` tokens for each key: [keys, count] int32."""
        begins = _mixed(_numbers(keys) ^ self._streams[stream])
        values = _mixed(begins[:, None] + np.arange(count, dtype=np.uint64))
        span = np.uint64(self._vocabulary - _LEAST_ID)
        return (values % span).astype(np.int32) + np.int32(_LEAST_ID)


def _numbers(keys: Iterable[int]) -> np.ndarray:
    return np.fromiter((key & _MASK for key in keys), np.uint64)


def _hashed(*parts: int) -> np.ndarray:
    """Hash numbers into one: [1] uint64."""
    found = _numbers((0,))
    for part in _numbers(parts):
        found = _mixed(found ^ part)
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread values over all of 64 bits: [...] uint64 -> [...] uint64."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
