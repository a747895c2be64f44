"""Llama (and SmolLM2, and dense Mistral without a window): GGUF metadata -> `ModelConfig`, and the weight names.

llama.cpp's converter stores the rows of Q and K permuted, so that rotary pairs are neighbours (2i, 2i + 1); the decoder
rotates halves (i, i + D / 2), so the permutation is undone here. Rope scaling, experts, biases and windows are refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..config import AttentionSpec, ModelConfig, Rope
from ..errors import CheckpointError
from .settings import integer, number
from .source import Source

# Keys that change what the model computes, with the values that mean "not used".
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
}


def config(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> ModelConfig:
    """The configuration of a llama GGUF; `tensor_names` tells whether the head is tied.

    Raises:
        CheckpointError: a missing or absurd value, or a feature that is not implemented.
    """
    for key, unused in _REFUSED.items():
        if (found := metadata.get(f"llama.{key}")) is not None and found not in unused:
            raise CheckpointError(f"llama.{key} = {found!r} is not implemented for the llama architecture.")
    if "rope_freqs.weight" in tensor_names:
        raise CheckpointError("Scaled rotary frequencies (tensor 'rope_freqs.weight') are not implemented.")
    hidden, heads = integer(metadata, "llama.embedding_length"), integer(metadata, "llama.attention.head_count")
    kv_heads = integer(metadata, "llama.attention.head_count_kv", heads)
    head_dim = integer(metadata, "llama.attention.key_length", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(f"{heads} query heads over {kv_heads} KV heads of size {head_dim} are not implemented.")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if integer(metadata, key, head_dim) != head_dim:
            raise CheckpointError(f"{key} = {metadata[key]} is not implemented: it must be the head size, {head_dim}.")
    blocks = integer(metadata, "llama.block_count")
    if blocks > len(tensor_names):
        raise CheckpointError(f"llama.block_count = {blocks} does not fit a file of {len(tensor_names)} tensors.")
    tokens = metadata.get("tokenizer.ggml.tokens")
    spec = AttentionSpec(Rope(number(metadata, "llama.rope.freq_base", 10000.0)))
    return ModelConfig(
        family="llama",
        vocab_size=integer(metadata, "llama.vocab_size", len(tokens) if isinstance(tokens, list) else None),
        hidden_size=hidden,
        intermediate_size=integer(metadata, "llama.feed_forward_length"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(metadata, "llama.attention.layer_norm_rms_epsilon", 1e-5),
        tie_embeddings="output.weight" not in tensor_names,
        max_position=integer(metadata, "llama.context_length"),
        layers=(spec,) * blocks,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """Parameter path of the decoder -> where it is in a GGUF file."""
    vocab, hidden, inner, dim = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim

    def projection(tensor: str, rows: int, columns: int, *, rotary: bool = False) -> Source:
        return Source(tensor, (rows, columns), transposed=True, rotary_pairs=dim if rotary else None)

    out = {
        "embedding.weight": Source("token_embd.weight", (vocab, hidden)),
        "norm.weight": Source("output_norm.weight", (hidden,)),
    }
    if not config.tie_embeddings:
        out["head.weight"] = Source("output.weight", (vocab, hidden))
    layer = {
        "attention_norm.weight": Source("attn_norm.weight", (hidden,)),
        "attention.q_proj": projection("attn_q.weight", q_rows, hidden, rotary=True),
        "attention.k_proj": projection("attn_k.weight", kv_rows, hidden, rotary=True),
        "attention.v_proj": projection("attn_v.weight", kv_rows, hidden),
        "attention.o_proj": projection("attn_output.weight", hidden, q_rows),
        "mlp_norm.weight": Source("ffn_norm.weight", (hidden,)),
        "mlp.gate_proj": projection("ffn_gate.weight", inner, hidden),
        "mlp.up_proj": projection("ffn_up.weight", inner, hidden),
        "mlp.down_proj": projection("ffn_down.weight", hidden, inner),
    }
    for i in range(config.num_layers):
        out |= {f"layers.{i}.{path}": replace(s, tensor=f"blk.{i}.{s.tensor}") for path, s in layer.items()}
    return out
