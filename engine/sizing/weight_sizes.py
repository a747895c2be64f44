"""Bytes of a model's weights on each device of a mesh, by what they are and by format, counted without making them.

Invariant: these are the bytes of the arrays that the device plane makes (`models/decoder.py`, `kernels_pallas/
block_tiles.py`) and divides (`sharding/mesh.py`); tests compare. Which parameters stay quantised is not decided here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ...kernels_pallas.formats.hopper import HOPPER_FORMATS, is_hopper
from ...kernels_pallas.formats.layouts import BLOCK, LAYOUTS, OUTPUTS
from ...models.config import ModelConfig
from ..topology import MeshSpec
from .heads import model_on
from .memory_needs import ITEM_BYTES


class WeightPart(NamedTuple):
    """Weights of one kind that are kept in one format."""

    kind: str  # one of `KINDS`
    format: str  # a dtype, or one of `LAYOUTS`
    bytes: int  # on each device of a mesh


KINDS = ("embedding", "attention", "MLP", "experts", "router", "norms", "head")


class _Matrix(NamedTuple):
    """A parameter that a product multiplies by; a mesh divides it along either side."""

    kind: str
    path: str
    outputs: int
    inputs: int
    is_table: bool = False  # its rows are looked up as well: one that does not divide is whole on every device
    stack: int = 1  # how many such matrices are one parameter
    is_whole: bool = False  # a mesh divides it along neither side


def weight_bytes(model: ModelConfig, dtype: str, tp: int, formats: Mapping[str, str] | None = None) -> int:
    """Return bytes of weights on each device of a mesh; arguments as of `weight_parts`."""
    return sum(part.bytes for part in weight_parts(model, dtype, tp, formats))


def weight_parts(
    model: ModelConfig, dtype: str, tp: int, formats: Mapping[str, str] | None = None
) -> tuple[WeightPart, ...]:
    """Count the weights on each device of a mesh, by what they are (in the order of `KINDS`) and by format.

    Args:
        model: as the mesh runs it (`heads.model_on`).
        dtype: of the weights that are not quantised; norms and sinks are float32.
        tp: devices of the mesh. Heads, the vocabulary and MLP columns or experts are divided.
        formats: path -> format, of the parameters that stay quantised, which the mesh cuts nowhere.
    """
    kept, item, sums = formats or {}, ITEM_BYTES[dtype], defaultdict[tuple[str, str], int](int)
    for matrix in _matrices(model):
        form = kept.get(matrix.path)
        sums[matrix.kind, form or dtype] += _bytes(matrix, item, form, tp)
    for kind, form, size in _vectors(model, dtype, tp):
        sums[kind, form] += size
    found = (WeightPart(kind, form, size) for (kind, form), size in sums.items() if size)
    return tuple(sorted(found, key=lambda part: (KINDS.index(part.kind), part.format)))


def largest_parameter(model: ModelConfig, dtype: str, tp: int, formats: Mapping[str, str] | None = None) -> int:
    """Return the bytes of the largest one on each device of a mesh; arguments as of `weight_parts`."""
    kept, item = formats or {}, ITEM_BYTES[dtype]
    return max(_bytes(matrix, item, kept.get(matrix.path), tp) for matrix in _matrices(model))


def _vectors(model: ModelConfig, dtype: str, tp: int) -> Iterator[WeightPart]:
    """Count what no product multiplies by: biases, norms and sinks."""
    layers, item = model.num_layers, ITEM_BYTES[dtype]
    norms = (4 if model.sandwich_norms else 2) * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    yield WeightPart("norms", "float32", 4 * (layers * norms + model.hidden_size))
    divided = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.qkv_bias else 0
    whole = model.hidden_size if model.output_bias else 0
    yield WeightPart("attention", dtype, layers * item * (divided // tp + whole))
    yield WeightPart("attention", "float32", layers * 4 * (model.num_heads // tp if model.has_sinks else 0))
    if model.experts is not None and model.experts.has_bias:
        count = model.experts.count
        each = 2 * model.intermediate_size // tp + model.hidden_size
        yield WeightPart("experts", dtype, layers * item * count * each)
        yield WeightPart("router", dtype, layers * item * count)


def _matrices(model: ModelConfig) -> Iterator[_Matrix]:
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    count = 1 if model.experts is None else model.experts.count
    kind = "MLP" if model.experts is None else "experts"
    for layer in range(model.num_layers):
        attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        yield _Matrix("attention", f"{attention}.q_proj", queries, hidden)
        yield _Matrix("attention", f"{attention}.k_proj", keys, hidden)
        yield _Matrix("attention", f"{attention}.v_proj", keys, hidden)
        yield _Matrix("attention", f"{attention}.o_proj", hidden, queries)
        yield _Matrix(kind, f"{mlp}.gate_proj", inner, hidden, stack=count)
        yield _Matrix(kind, f"{mlp}.up_proj", inner, hidden, stack=count)
        yield _Matrix(kind, f"{mlp}.down_proj", hidden, inner, stack=count)
        if model.experts is not None:
            yield _Matrix("router", f"{mlp}.router", count, hidden, is_whole=True)
    yield _Matrix("embedding", "embedding.weight", model.vocab_size, hidden, is_table=True)
    if not model.tie_embeddings:
        yield _Matrix("head", "head.weight", model.vocab_size, hidden, is_table=True)


def kept_on_gpus(asked: str | None, stored: Mapping[str, str], kind: str) -> Mapping[str, str]:
    """Return those of the parameters that files hold quantised which stay so on a kind of GPU, path -> format.

    `asked` is the engine's `quantization`: auto, keep, none, or a method or None, which mean auto.
    """
    if asked == "keep":
        return stored
    has_kernels = asked != "none" and is_hopper(kind)
    return {path: form for path, form in stored.items() if has_kernels and form in HOPPER_FORMATS}


def kept_on(model: ModelConfig, spec: MeshSpec, formats: Mapping[str, str]) -> Mapping[str, str]:
    """Return those of quantised parameters that a mesh can keep so, path -> format: the others would be cut inside a
    tile of outputs, or a block of inputs or group that shares a scale. `model` is the checkpoint's."""
    if spec.tp == 1 or not formats:
        return formats
    cut, repeats = set[str](), model.num_kv_heads < spec.tp
    for matrix in _matrices(model_on(model, spec.tp)):
        if (form := formats.get(matrix.path)) is None:
            continue
        name, ways = matrix.path.rpartition(".")[2], spec.tp // (spec.ep if matrix.kind == "experts" else 1)
        if name in ("o_proj", "down_proj"):
            is_cut = matrix.inputs // ways % max(BLOCK, LAYOUTS[form].group) != 0
        else:
            is_cut = not matrix.is_table and not matrix.is_whole and matrix.outputs // ways % OUTPUTS != 0
        # One device's share of a matrix is whole, however it lies.
        if (ways > 1 and is_cut) or (repeats and name in ("k_proj", "v_proj") and model.head_dim % OUTPUTS):
            cut.add(matrix.path)
    return {path: form for path, form in formats.items() if path not in cut}


def _bytes(matrix: _Matrix, item: int, format_name: str | None, tp: int) -> int:
    """Return bytes on each device; `item`: of a weight that is not quantised."""
    if format_name is None:
        whole, unit = matrix.outputs * matrix.inputs * item, 1
    else:
        tiles = -(-matrix.outputs // OUTPUTS)
        whole, unit = int(tiles * OUTPUTS * matrix.inputs * LAYOUTS[format_name].bits_per_weight / 8), OUTPUTS
    is_whole = matrix.is_whole or (matrix.is_table and matrix.outputs % (tp * unit) != 0)
    return matrix.stack * (whole if is_whole else whole // tp)
