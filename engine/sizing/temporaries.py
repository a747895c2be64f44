"""Bytes of temporaries that a GPU's steps may take besides weights, KV and request state: a bound from sizes alone.

A device runs one program at a time, so that what the largest of them takes is enough: a prefill step's layers, decode
attention's partial sums, or a stage of sampling. Beside it lie the logits of steps whose tokens are not read yet, and
one parameter, the largest, which exists twice while it is replaced. `tests/h100` compares with what XLA plans, and so
does `twinmesh plan --memory`: the bound is 1.2 to 1.3 times what it adds up to. A CPU takes temporaries from the memory
that its KV leaves. Not yet tried on a GPU.
"""

from collections.abc import Mapping

from ...models.config import ModelConfig
from ..config import EngineConfig
from .memory_needs import ITEM_BYTES
from .weight_sizes import largest_parameter

_MOST_SPLITS = 64  # of a request in decode attention
_BLOCK_ROWS = 64  # of a block of rows that pass one expert, at most
_LOGIT, _SAMPLER_BYTES = 4, 12  # bytes of a logit, and of the largest stage of sampling for each
_STEPS_AHEAD = 3  # steps whose logits may exist at once


def temporary_bytes(model: ModelConfig, config: EngineConfig, tp: int, formats: Mapping[str, str] | None = None) -> int:
    """Return the bytes on each device of a mesh.

    Args:
        model: as the mesh runs it.
        config: the engine's.
        tp: devices of the mesh.
        formats: path -> format, of the weights that stay quantised.
    """
    size, rows = ITEM_BYTES[config.dtype], config.decode_buckets[-1]
    layer = size * (2 * model.intermediate_size // tp + 4 * model.hidden_size)  # gate and up; rows of the hidden state
    heads = -(-model.num_heads // (4 * tp)) * 4
    sums = 4 * 2 * rows * _MOST_SPLITS * heads * model.head_dim
    decode = rows * layer + _expert_bytes(model, rows, tp, size) + sums
    # A fused step has the rows of both phases at once.
    is_fused = any(spec.fused for spec in config.topology.meshes)
    tokens = config.chunk_size + (rows if is_fused else 0)
    prefill = tokens * layer + _expert_bytes(model, tokens, tp, size) + (sums if is_fused else 0)
    logits = max(rows, config.prefill_rows + (rows if is_fused else 0)) * model.vocab_size
    step = max(prefill, decode, logits * _SAMPLER_BYTES)
    return step + _STEPS_AHEAD * _LOGIT * logits + largest_parameter(model, config.dtype, tp, formats)


def _expert_bytes(model: ModelConfig, tokens: int, tp: int, size: int) -> int:
    """Return bytes of a mixture of experts' temporaries: every choice's output in float32, in blocks of rows that may
    be empty in part, and the weights of the expert at work."""
    if model.experts is None:
        return 0
    choices = tokens * model.experts.per_token + model.experts.count * _BLOCK_ROWS
    return 4 * choices * model.hidden_size + 3 * size * model.hidden_size * model.intermediate_size // tp
