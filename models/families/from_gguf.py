"""Reads what the families share from a GGUF file: the configuration in its metadata, and the tensors' names.

A family calls `config_of` and replaces what differs. Keys are those of ggml's docs/gguf.md, under the architecture's
name; tensor names are those of llama.cpp's gguf-py (`constants.py`).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import AttentionSpec, Experts, ModelConfig, Rope
from ..errors import CheckpointError
from .raw_config import Settings
from .rope import Correction, linear, stretched, yarn
from .tensor_names import ExpertNames, TensorNames

NAMES = TensorNames(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}.",
    attention_norm="attn_norm",
    q="attn_q",
    k="attn_k",
    v="attn_v",
    o="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    mlp_norm="ffn_norm",
    gate="ffn_gate",
    up="ffn_up",
    down="ffn_down",
    attention_output_norm="post_attention_norm",
    mlp_output_norm="post_ffw_norm",
    sinks="attn_sinks.weight",
    experts=ExpertNames(router="ffn_gate_inp", gate="ffn_gate_exps", up="ffn_up_exps", down="ffn_down_exps"),
)
# A tensor that is no parameter: the divisor of each rotary frequency (Llama 3.1's scaling).
ROPE_FACTORS = "rope_freqs.weight"
# Keys that change what a model computes, with the values that mean "not used".
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.causal": (True,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
}


@dataclass(frozen=True)
class GGUFHeader:
    """The part of a GGUF file that a family reads its configuration from."""

    settings: Settings  # the metadata under the architecture's name
    vocabulary: int | None  # rows of the embedding, or else tokens of the tokenizer; None: the file has neither
    tensors: Collection[str]  # names
    vector: Callable[[str], tuple[float, ...]]  # reads a small tensor that holds settings, by name


def config_of(
    header: GGUFHeader,
    family: str,
    *,
    has_window: bool = False,
    has_experts: bool = False,
    rounds_yarn: bool = True,
) -> ModelConfig:
    """Read the configuration from the metadata.

    No layer has a window yet, and the head is the embedding where the file has no tensor for it.

    Args:
        header: of the file.
        family: name for messages and metrics.
        has_window: whether the family reads `attention.sliding_window` itself; otherwise it is refused.
        has_experts: whether its layers may be mixtures of experts; otherwise those are refused.
        rounds_yarn: whether YaRN, if the file scales by it, rounds the bounds between its kinds of frequencies.

    Raises:
        CheckpointError: a missing or absurd value, or a feature that is not implemented.
    """
    settings = header.settings
    for key, unused in _REFUSED.items():
        settings.refuse(key, *unused)
    if not has_experts:
        settings.refuse("expert_count", 0)
    if not has_window:
        settings.refuse("attention.sliding_window", 0)
    blocks = settings.integer("block_count")
    if blocks > len(header.tensors):
        raise CheckpointError(f"block_count = {blocks} does not fit a file of {len(header.tensors)} tensors.")
    hidden, heads = settings.integer("embedding_length"), settings.same_integer("attention.head_count", blocks)
    dim = settings.integer("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.integer(key, dim) != dim:
            raise settings.refusal(key, f"it must be the head size, {dim}")
    rope, experts = _rope(header, dim, rounds_yarn), _experts(settings)
    columns = "feed_forward_length"
    if experts is not None and "expert_feed_forward_length" in settings:
        columns = "expert_feed_forward_length"
    return ModelConfig(
        family=family,
        vocab_size=header.vocabulary or settings.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=settings.same_integer(columns, blocks),
        num_heads=heads,
        num_kv_heads=settings.same_integer("attention.head_count_kv", blocks, heads),
        head_dim=dim,
        rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon", 1e-5),
        tie_embeddings=f"{NAMES.head}.weight" not in header.tensors,
        max_position=_context(settings, rope),
        layers=(AttentionSpec(rope),) * blocks,
        experts=experts,
    )


def _experts(settings: Settings) -> Experts | None:
    """Read how many experts there are; their shares add up to 1, as in all architectures that are read here."""
    if settings.get("expert_count", 0) == 0:
        return None
    return Experts(settings.integer("expert_count"), settings.integer("expert_used_count"))


def _context(settings: Settings, rope: Rope) -> int:
    """Read the context; the file may say that it was shorter originally, and then counts the scaling already."""
    context = settings.integer("context_length")
    is_original = settings.get("rope.scaling.original_context_length", context) == context
    if is_original and settings.get("rope.scaling.type") == "yarn":
        return int(context * settings.number("rope.scaling.factor"))
    return stretched(context, rope) if is_original else context


def _rope(header: GGUFHeader, head_dim: int, rounds_yarn: bool) -> Rope:
    """Read the rotary embedding as llama.cpp does.

    A scaling factor without a type is linear, and 0 means none; `rope.scale_linear` is its former name; the factors of
    the tensor `ROPE_FACTORS`, if the file has it, multiply it.
    """
    settings = header.settings
    settings.refuse("rope.scaling.type", "none", "linear", "yarn")
    theta, named = settings.number("rope.freq_base", 10000.0), settings.get("rope.scaling.type", "linear")
    if named == "yarn":
        original = settings.number("rope.scaling.original_context_length", settings.integer("context_length"))
        fast = settings.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = settings.number("rope.scaling.yarn_beta_slow", 1.0)
        correction = Correction(fast, slow, is_truncated=rounds_yarn)
        return yarn(theta, settings.number("rope.scaling.factor"), original, head_dim, correction)
    key = "rope.scaling.factor" if "rope.scaling.factor" in settings else "rope.scale_linear"
    is_used = named == "linear" and settings.get(key) != 0
    factor = settings.number(key, 1.0) if is_used else 1.0
    if ROPE_FACTORS not in header.tensors:
        return linear(theta, factor, head_dim)
    factors = header.vector(ROPE_FACTORS)
    if not all(0 < each < math.inf for each in factors):
        raise CheckpointError(f"tensor {ROPE_FACTORS!r} holds {min(factors)}: positive factors are expected.")
    return Rope(theta, tuple(each * factor for each in factors))
