"""Bytes of a model's weights on each device of a mesh, counted without making them; quantised ones included.

Invariant: these are the bytes of the arrays that the device plane makes (`models/decoder.py`, `kernels_pallas/
block_tiles.py`) and divides (`sharding/mesh.py`); tests compare. Which parameters stay quantised is not decided here.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...models.config import ModelConfig
from .memory_needs import ITEM_BYTES

# Bits of a weight in each format that may stay: its own, and its part of scales and smallest values.
FORMAT_BITS = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q6_K": 8.0, "Q4_K": 6.0, "MXFP4": 4.25}
_TILE = 16  # outputs of a quantised matrix that lie together


class _Matrix(NamedTuple):
    """A parameter that a product multiplies by; a mesh divides it along either side."""

    path: str
    outputs: int
    inputs: int
    is_table: bool = False  # its rows are looked up as well: one that does not divide is whole on every device
    stack: int = 1  # how many such matrices are one parameter
    is_whole: bool = False  # a mesh divides it along neither side


def weight_bytes(model: ModelConfig, dtype: str, tp: int, formats: Mapping[str, str] | None = None) -> int:
    """Return bytes of weights on each device of a mesh.

    Args:
        model: as the mesh runs it (`heads.model_on`).
        dtype: of the weights that are not quantised; norms are float32.
        tp: devices of the mesh. Heads, MLP columns and the vocabulary are divided.
        formats: path -> format, of the parameters that stay quantised, which the mesh cuts nowhere.
    """
    kept, item = formats or {}, ITEM_BYTES[dtype]
    matrices = sum(_bytes(matrix, item, kept.get(matrix.path), tp) for matrix in _matrices(model))
    norms = (4 if model.sandwich_norms else 2) * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    sinks = model.num_heads // tp if model.has_sinks else 0
    layers = model.num_layers * (item * _biases(model, tp) + 4 * (norms + sinks))
    return matrices + layers + 4 * model.hidden_size


def _biases(model: ModelConfig, tp: int) -> int:
    """Count the numbers in a layer's biases on each device."""
    divided = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.qkv_bias else 0
    whole = model.hidden_size if model.output_bias else 0
    if model.experts is not None and model.experts.has_bias:
        divided += 2 * model.experts.count * model.intermediate_size
        whole += model.experts.count * (1 + model.hidden_size)
    return divided // tp + whole


def _matrices(model: ModelConfig) -> Iterator[_Matrix]:
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for layer in range(model.num_layers):
        attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        yield _Matrix(f"{attention}.q_proj", queries, hidden)
        yield _Matrix(f"{attention}.k_proj", keys, hidden)
        yield _Matrix(f"{attention}.v_proj", keys, hidden)
        yield _Matrix(f"{attention}.o_proj", hidden, queries)
        count = 1 if model.experts is None else model.experts.count
        yield _Matrix(f"{mlp}.gate_proj", inner, hidden, stack=count)
        yield _Matrix(f"{mlp}.up_proj", inner, hidden, stack=count)
        yield _Matrix(f"{mlp}.down_proj", hidden, inner, stack=count)
        if model.experts is not None:
            yield _Matrix(f"{mlp}.router", count, hidden, is_whole=True)
    yield _Matrix("embedding.weight", model.vocab_size, hidden, is_table=True)
    if not model.tie_embeddings:
        yield _Matrix("head.weight", model.vocab_size, hidden, is_table=True)


def _bytes(matrix: _Matrix, item: int, format_name: str | None, tp: int) -> int:
    """Return bytes on each device; `item`: of a weight that is not quantised."""
    if format_name is None:
        whole, unit = matrix.outputs * matrix.inputs * item, 1
    else:
        tiles = -(-matrix.outputs // _TILE)
        whole, unit = int(tiles * _TILE * matrix.inputs * FORMAT_BITS[format_name] / 8), _TILE
    is_whole = matrix.is_whole or (matrix.is_table and matrix.outputs % (tp * unit) != 0)
    return matrix.stack * (whole if is_whole else whole // tp)
