"""Token ids for a workload's prompts, which has none: made up, and the same wherever the workload says that they are.

A block of the workload stands for the same tokens in every prompt that has it. A later turn of a conversation begins
with the prompt and the answer before it, as the engine gave it: what the block ids that go on over the answer stand for
is known only when it is there. Pure functions of seed and workload, but for those answers.
"""

from functools import lru_cache

import numpy as np

from ..simulation.workload import WorkRequest

_LEAST_ID = 3  # of made-up tokens: those before are special in most vocabularies
_ALONE = 1  # stream of prompts that share nothing; blocks are of stream 0
_BLOCKS = 4096  # kept at once


class Prompts:
    """Makes the prompts of one workload."""

    def __init__(self, vocabulary: int, block_tokens: int, seed: int = 0) -> None:
        """Make tokens from a vocabulary of so many; a workload's block has `block_tokens`."""
        self._vocabulary, self._block_tokens, self._seed = vocabulary, block_tokens, seed
        self._block = lru_cache(_BLOCKS)(self._draw_block)

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
        length, parts = work.prompt_len, [self._block(block) for block in work.blocks]
        rest = length - self._block_tokens * len(parts)
        if rest > 0:
            parts.append(self._draw((self._seed, _ALONE, number), rest))
        return np.concatenate(parts)[:length]

    def _draw_block(self, block: int) -> np.ndarray:
        return self._draw((self._seed, 0, block), self._block_tokens)

    def _draw(self, seed: tuple[int, ...], count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(_LEAST_ID, self._vocabulary, count, dtype=np.int32)
