"""Maps the decoder's parameters to a checkpoint's tensors: names are data, and one mapping serves every family.

The `ModelConfig` determines which parameters a model has; a `TensorNames` says how their tensors are called. Hugging
Face and llama.cpp have one each, in which a family replaces a few names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import ModelConfig
from .tensor_source import Places, Source, renamed, stacked


@dataclass(frozen=True)
class ExpertNames:
    """Names of the tensors of a mixture of experts, as in `TensorNames`.

    Where a projection's name has a {}, each expert has a tensor [out, in] of its own; otherwise one tensor has all.
    """

    router: str
    gate: str
    up: str
    down: str


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
    sinks: str = ""  # the whole name
    experts: ExpertNames = ExpertNames("", "", "", "")


def sources_of(
    config: ModelConfig,
    names: TensorNames,
    *,
    norm_offset: float = 0.0,
    rotary_pairs: bool = False,
    mlp: Mapping[str, Places] | None = None,
) -> dict[str, Places]:
    """Map each parameter path of the decoder to its place in the checkpoint.

    Args:
        config: determines the parameters and their sizes.
        names: the names of their tensors.
        norm_offset: the constant that the family's own code adds to its norms' weights (Gemma: 1), added on loading.
        rotary_pairs: whether the rows of q and k are ordered with the two halves of each rotary pair as neighbours.
        mlp: the places of the parameters of a layer's MLP or experts, where they are the family's own.
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    out: dict[str, Places] = {
        "embedding.weight": Source(f"{names.embedding}.weight", (vocab, hidden)),
        "norm.weight": Source(f"{names.norm}.weight", (hidden,), offset=norm_offset),
    }
    if not config.tie_embeddings:
        out["head.weight"] = Source(f"{names.head}.weight", (vocab, hidden))
    layer = _attention(config, names, rotary_pairs) | _norms(config, names, norm_offset)
    if mlp is None:
        mlp = _mlp(config, names) if config.experts is None else _experts(config, names.experts)
    layer |= mlp
    for i in range(config.num_layers):
        prefix = names.layer.format(i)
        for path, places in layer.items():
            out[f"layers.{i}.{path}"] = renamed(places, prefix.__add__)
    return out


def _attention(config: ModelConfig, names: TensorNames, rotary_pairs: bool) -> dict[str, Places]:
    dim, hidden = config.head_dim, config.hidden_size
    pairs = dim if rotary_pairs else None
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    rows = {"attention.q_proj": q_rows, "attention.k_proj": kv_rows, "attention.v_proj": kv_rows}
    projections = _rows(rows, hidden, (names.q, names.k, names.v), names.qkv)
    for path in ("attention.q_proj", "attention.k_proj"):
        projections[path] = replace(projections[path], rotary_pairs=pairs)
    out: dict[str, Places] = {**projections}
    out["attention.o_proj"] = Source(f"{names.o}.weight", (hidden, q_rows), transposed=True)
    if config.qkv_bias:
        out["attention.q_bias"] = Source(f"{names.q}.bias", (q_rows,), rotary_pairs=pairs)
        out["attention.k_bias"] = Source(f"{names.k}.bias", (kv_rows,), rotary_pairs=pairs)
        out["attention.v_bias"] = Source(f"{names.v}.bias", (kv_rows,))
    if config.output_bias:
        out["attention.o_bias"] = Source(f"{names.o}.bias", (hidden,))
    if config.has_sinks:
        out["attention.sinks"] = Source(names.sinks, (config.num_heads,))
    return out


def _mlp(config: ModelConfig, names: TensorNames) -> Mapping[str, Places]:
    hidden, inner = config.hidden_size, config.intermediate_size
    out = _rows({"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, (names.gate, names.up), names.gate_up)
    return out | {"mlp.down_proj": Source(f"{names.down}.weight", (hidden, inner), transposed=True)}


def _experts(config: ModelConfig, names: ExpertNames) -> dict[str, Places]:
    assert config.experts is not None
    count, hidden, inner = config.experts.count, config.hidden_size, config.intermediate_size
    out = router_of(config, names)
    for name, tensor, rows, columns in (
        ("gate", names.gate, inner, hidden), ("up", names.up, inner, hidden), ("down", names.down, hidden, inner)
    ):  # fmt: skip
        out[f"mlp.{name}_proj"] = stacked(f"{tensor}.weight", count, rows, columns)
        if config.experts.has_bias:
            out[f"mlp.{name}_bias"] = Source(f"{tensor}.bias", (count, rows))
    return out


def router_of(config: ModelConfig, names: ExpertNames) -> dict[str, Places]:
    """Map the router's parameters of a layer to their places."""
    assert config.experts is not None
    count, hidden = config.experts.count, config.hidden_size
    out: dict[str, Places] = {"mlp.router": Source(f"{names.router}.weight", (count, hidden))}
    if config.experts.has_bias:
        out["mlp.router_bias"] = Source(f"{names.router}.bias", (count,))
    return out


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
