"""Maps the decoder's parameters to a checkpoint's tensors: names are data, and one mapping serves every family.

The `ModelConfig` determines which parameters a model has; a `TensorNames` says how their tensors are called. Hugging
Face and llama.cpp have one each, in which a family replaces a few names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import ModelConfig
from .tensor_source import Source


@dataclass(frozen=True)
class TensorNames:
    """Names of tensors without ".weight" or ".bias"; one is used only if the `ModelConfig` has its parameter."""

    embedding: str
    norm: str  # the final norm
    head: str
    layer: str  # prefix of the names below; {} stands for the layer's index
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str
    k_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    attention_output_norm: str = ""
    mlp_output_norm: str = ""
    qkv: str | None = None  # one tensor with the rows of q, then k, then v; None: three tensors
    gate_up: str | None = None  # one tensor with the rows of gate, then up; None: two tensors


def sources_of(
    config: ModelConfig, names: TensorNames, *, norm_offset: float = 0.0, rotary_pairs: bool = False
) -> dict[str, Source]:
    """Map each parameter path of the decoder to its place in the checkpoint.

    Args:
        config: determines the parameters and their sizes.
        names: the names of their tensors.
        norm_offset: the constant that the family's own code adds to its norms' weights (Gemma: 1), added on loading.
        rotary_pairs: whether the rows of q and k are ordered with the two halves of each rotary pair as neighbours.
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    out = {
        "embedding.weight": Source(f"{names.embedding}.weight", (vocab, hidden)),
        "norm.weight": Source(f"{names.norm}.weight", (hidden,), offset=norm_offset),
    }
    if not config.tie_embeddings:
        out["head.weight"] = Source(f"{names.head}.weight", (vocab, hidden))
    layer = _attention(config, names, rotary_pairs) | _mlp(config, names) | _norms(config, names, norm_offset)
    for i in range(config.num_layers):
        prefix = names.layer.format(i)
        out |= {f"layers.{i}.{path}": replace(source, tensor=prefix + source.tensor) for path, source in layer.items()}
    return out


def _attention(config: ModelConfig, names: TensorNames, rotary_pairs: bool) -> dict[str, Source]:
    dim, hidden = config.head_dim, config.hidden_size
    pairs = dim if rotary_pairs else None
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    rows = {"attention.q_proj": q_rows, "attention.k_proj": kv_rows, "attention.v_proj": kv_rows}
    out = _rows(rows, hidden, (names.q, names.k, names.v), names.qkv)
    for path in ("attention.q_proj", "attention.k_proj"):
        out[path] = replace(out[path], rotary_pairs=pairs)
    out["attention.o_proj"] = Source(f"{names.o}.weight", (hidden, q_rows), transposed=True)
    if config.qkv_bias:
        out["attention.q_bias"] = Source(f"{names.q}.bias", (q_rows,), rotary_pairs=pairs)
        out["attention.k_bias"] = Source(f"{names.k}.bias", (kv_rows,), rotary_pairs=pairs)
        out["attention.v_bias"] = Source(f"{names.v}.bias", (kv_rows,))
    return out


def _mlp(config: ModelConfig, names: TensorNames) -> dict[str, Source]:
    hidden, inner = config.hidden_size, config.intermediate_size
    out = _rows({"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, (names.gate, names.up), names.gate_up)
    return out | {"mlp.down_proj": Source(f"{names.down}.weight", (hidden, inner), transposed=True)}


def _norms(config: ModelConfig, names: TensorNames, offset: float) -> dict[str, Source]:
    hidden, dim = config.hidden_size, config.head_dim
    norms = {"attention_norm": (names.attention_norm, hidden), "mlp_norm": (names.mlp_norm, hidden)}
    if config.qk_norm:
        norms |= {"attention.q_norm": (names.q_norm, dim), "attention.k_norm": (names.k_norm, dim)}
    if config.sandwich_norms:
        norms["attention_output_norm"] = (names.attention_output_norm, hidden)
        norms["mlp_output_norm"] = (names.mlp_output_norm, hidden)
    return {
        f"{path}.weight": Source(f"{tensor}.weight", (size,), offset=offset) for path, (tensor, size) in norms.items()
    }


def _rows(rows: Mapping[str, int], columns: int, tensors: tuple[str, ...], one: str | None) -> dict[str, Source]:
    """Map projections to their places, given by path and number of rows.

    They are in `tensors`, one each, or one after the other in the tensor `one`.
    """
    if one is None:
        return {
            path: Source(f"{tensor}.weight", (count, columns), transposed=True)
            for (path, count), tensor in zip(rows.items(), tensors, strict=True)
        }
    out, first = {}, 0
    for path, count in rows.items():
        shape = (sum(rows.values()), columns)
        out[path] = Source(f"{one}.weight", shape, transposed=True, first_row=first, rows=count)
        first += count
    return out
