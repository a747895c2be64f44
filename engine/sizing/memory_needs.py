"""Bytes that a mesh needs besides weights and KV pages, and those of a page: request state, temporaries.

Invariant: these are the bytes of the arrays that the device plane makes (`worker/kv_cache.py`, `models/decoder.py`),
counted without making them; tests compare.
"""

from ...models.config import ModelConfig
from ..config import EngineConfig
from ..kv_dtypes import KVDtype
from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from .cache_groups import groups

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of each of `config.DTYPES`
TRANSFERS_WITH_STATE = 8  # that may carry a request's state at once, for each mesh
# Bytes of temporaries for each logit of a row that is sampled for, and splits of a request in decode attention.
_SAMPLER_BYTES, _MOST_SPLITS = 32, 64
_BLOCK_ROWS = 64  # of a block of rows that pass one expert, at most
_SCALARS = 11  # numbers of 4 bytes that a slot has, and for each token of the vocabulary it has two
_DENSE_NUMBERS = 2


def page_bytes(model: ModelConfig, page_size: int, kv: KVDtype) -> tuple[int, ...]:
    """Return bytes of one page of each cache group: its layers' keys, values and scales together, all shards."""
    per_layer = page_size * model.num_kv_heads * kv.bytes_of(model.head_dim)
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


def temporary_bytes(model: ModelConfig, config: EngineConfig, tp: int) -> int:
    """Return bytes of temporaries that a GPU's steps may take on each device, besides weights, KV and request state.

    They are those of the largest prefill step's layers, of the sampler, of decode attention's partial sums, and one
    parameter, the largest, which exists twice while it is replaced. `tests/h100` compares with what XLA plans; a CPU
    takes them from the memory that its KV leaves.
    """
    size, rows = ITEM_BYTES[config.dtype], config.decode_buckets[-1]
    layer = size * (2 * model.intermediate_size // tp + 4 * model.hidden_size)  # gate and up; rows of the hidden state
    # A fused step has the rows of both phases at once.
    fused = rows if any(spec.fused for spec in config.topology.meshes) else 0
    sampled = max(rows, config.prefill_rows + fused) * model.vocab_size * _SAMPLER_BYTES
    heads = -(-model.num_heads // (4 * tp)) * 4
    sums = 4 * 2 * rows * _MOST_SPLITS * heads * model.head_dim
    largest = model.vocab_size * model.hidden_size * size // tp
    tokens = config.chunk_size + fused
    return tokens * layer + sampled + sums + largest + _expert_bytes(model, tokens, tp, size)


def _expert_bytes(model: ModelConfig, tokens: int, tp: int, size: int) -> int:
    """Return bytes of a mixture of experts' temporaries: every choice's output in float32, in blocks of rows that may
    be empty in part, and the weights of the expert at work."""
    if model.experts is None:
        return 0
    choices = tokens * model.experts.per_token + model.experts.count * _BLOCK_ROWS
    return 4 * choices * model.hidden_size + 3 * size * model.hidden_size * model.intermediate_size // tp
