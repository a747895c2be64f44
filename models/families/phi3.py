"""Phi-3, and Phi-4 models of its architecture: Llama with q, k, v fused, gate, up fused, and a sliding window.

Models with longrope (the 128k contexts) or with partly rotated heads (Phi-4 mini) are refused by name.
"""

from dataclasses import replace
from functools import partial

from ..config import ModelConfig
from . import from_gguf, from_hugging_face
from .family import Family, Format
from .from_gguf import GGUFHeader
from .from_hugging_face import all_sliding
from .tensor_names import sources_of


def _of_gguf(header: GGUFHeader) -> ModelConfig:
    config = from_gguf.config_of(header, "phi3", has_window=True)
    if header.settings.get("attention.sliding_window", 0) == 0:
        return config
    window = header.settings.integer("attention.sliding_window")
    return replace(config, layers=tuple(replace(spec, window=window) for spec in config.layers))


FAMILY = Family(
    Format(
        names=("phi3",),
        config=partial(from_hugging_face.config_of, family="phi3", kinds=all_sliding),
        sources=partial(
            sources_of,
            names=replace(from_hugging_face.NAMES, qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
        ),
    ),
    Format(
        names=("phi3",),
        config=_of_gguf,
        sources=partial(sources_of, names=replace(from_gguf.NAMES, qkv="attn_qkv", gate_up="ffn_up")),
    ),
)
