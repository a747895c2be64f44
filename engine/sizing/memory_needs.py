"""Bytes of a page of KV, and of the request state that a mesh has besides.

Invariant: these are the bytes of the arrays that the device plane makes (`worker/kv_cache.py`, `models/decoder.py`),
counted without making them; tests compare.
"""

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from .cache_groups import groups

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of each of `config.DTYPES`
TRANSFERS_WITH_STATE = 8  # that may carry a request's state at once, for each mesh
_SCALARS = 11  # numbers of 4 bytes that a slot has, and for each token of the vocabulary it has two
_DENSE_NUMBERS = 2


def page_bytes(model: ModelConfig, page_size: int, dtype: str) -> tuple[int, ...]:
    """Return bytes of one page of each cache group: its layers' keys and values together, all shards."""
    per_layer = 2 * page_size * model.num_kv_heads * model.head_dim * ITEM_BYTES[dtype]
    return tuple(len(group.layers) * per_layer for group in groups(model))


def request_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Return bytes of request state and page tables on each device of a mesh: they do not shrink with its size."""
    bad_words = MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS + MAX_BAD_WORD_TOKENS - 1
    a_slot = _SCALARS + _DENSE_NUMBERS * model.vocab_size + bad_words + len(groups(model)) * config.max_pages
    return 4 * config.max_num_seqs * a_slot


def state_bytes() -> int:
    """Return bytes of one request's scalars, which every transfer takes along to each device of its destination."""
    return 4 * _SCALARS


def transit_bytes(config: EngineConfig) -> int:
    """Return bytes of request state on each device that is on its way: staging is for KV pages, and it comes on top."""
    return TRANSFERS_WITH_STATE * state_bytes() if config.has_handoffs else 0
