"""Gemma 3, text only: norms around attention and MLP, QK norm, five layers with a sliding window to each without.

Norms multiply by 1 + weight: Hugging Face stores the weight, llama.cpp's converter has added the 1. A GGUF file seldom
says which layers have a window or what their rotary base is, and never names the activation: these are the family's
(Gemma 3 technical report, 2025, section 2, and Hugging Face's `Gemma3TextConfig`). The context that the files give
counts the linear scaling of the full layers already.
"""

import math
from dataclasses import replace
from functools import partial

from ..config import AttentionSpec, ModelConfig, Rope
from . import from_gguf, from_hugging_face
from .family import Family, Format
from .from_gguf import GGUFHeader
from .from_hugging_face import FULL, SLIDING
from .raw_config import Settings
from .tensor_names import sources_of

_PERIOD = 6  # every sixth layer has no window
_LOCAL_THETA = 10_000.0
# Only the 27B model scales scores by its hidden size per head; like llama.cpp, it is recognised by its depth.
_LAYERS_27B = 62


def _of_hugging_face(settings: Settings) -> ModelConfig:
    config = from_hugging_face.config_of(
        settings,
        "gemma3",
        kinds=_kinds,
        tied=True,
        head_dim=256,
        theta=1_000_000.0,
        local_theta=_LOCAL_THETA,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    )
    config = replace(config, max_position=settings.integer("max_position_embeddings"))
    return _as_gemma(config, settings.number("query_pre_attn_scalar", 256))


def _kinds(settings: Settings, layers: int) -> list[str]:
    period = settings.integer("sliding_window_pattern", _PERIOD)
    return [SLIDING if (index + 1) % period else FULL for index in range(layers)]


def _of_gguf(header: GGUFHeader) -> ModelConfig:
    config = from_gguf.config_of(header, "gemma3", has_window=True)
    window = header.settings.integer("attention.sliding_window")
    period = header.settings.integer("attention.sliding_window_pattern", _PERIOD)
    local = AttentionSpec(Rope(header.settings.number("rope.freq_base_swa", _LOCAL_THETA)), window)
    layers = tuple(local if (i + 1) % period else spec for i, spec in enumerate(config.layers))
    is_27b = config.num_layers == _LAYERS_27B
    context = header.settings.integer("context_length")
    config = replace(config, layers=layers, activation="gelu_tanh", max_position=context)
    return _as_gemma(config, config.hidden_size / config.num_heads if is_27b else config.head_dim)


def _as_gemma(config: ModelConfig, query_pre_attn_scalar: float) -> ModelConfig:
    return replace(
        config,
        qk_norm=True,
        sandwich_norms=True,
        embedding_scale=math.sqrt(config.hidden_size),
        query_scale=query_pre_attn_scalar**-0.5,
        fits_float16=False,
    )


FAMILY = Family(
    Format(
        names=("gemma3_text",),
        config=_of_hugging_face,
        sources=partial(
            sources_of,
            names=replace(
                from_hugging_face.NAMES,
                attention_output_norm="post_attention_layernorm",
                mlp_norm="pre_feedforward_layernorm",
                mlp_output_norm="post_feedforward_layernorm",
            ),
            norm_offset=1.0,
        ),
    ),
    Format(names=("gemma3",), config=_of_gguf, sources=partial(sources_of, names=from_gguf.NAMES)),
)
