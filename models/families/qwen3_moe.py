"""Qwen3 with experts in every layer. Models that have layers without, too, are refused by name.

Each file of the hub says whether the chosen experts' weights are scaled to a sum of 1; llama.cpp always does it.
"""

from dataclasses import replace
from functools import partial

from ..config import Experts, ModelConfig
from . import from_gguf, from_hugging_face
from .family import Family, Format
from .from_gguf import GGUFHeader
from .from_hugging_face import sliding_from
from .raw_config import Settings
from .tensor_names import ExpertNames, sources_of

_EXPERTS = ExpertNames(
    router="mlp.gate", gate="mlp.experts.{}.gate_proj", up="mlp.experts.{}.up_proj", down="mlp.experts.{}.down_proj"
)


def _of_hugging_face(settings: Settings) -> ModelConfig:
    settings.refuse("decoder_sparse_step", 1)
    settings.refuse("mlp_only_layers", [])
    counts = ("num_experts", "num_local_experts")
    config = from_hugging_face.config_of(settings, "qwen3_moe", kinds=sliding_from, head_dim=128, reads=counts)
    count = settings.integer("num_experts" if "num_experts" in settings else "num_local_experts")
    per_token = settings.integer("num_experts_per_tok", 8)
    experts = Experts(count, per_token, is_normalised=settings.flag("norm_topk_prob", False))
    return replace(config, qk_norm=True, intermediate_size=settings.integer("moe_intermediate_size"), experts=experts)


def _of_gguf(header: GGUFHeader) -> ModelConfig:
    return replace(from_gguf.config_of(header, "qwen3_moe", has_experts=True), qk_norm=True)


FAMILY = Family(
    Format(
        names=("qwen3_moe",),
        config=_of_hugging_face,
        sources=partial(sources_of, names=replace(from_hugging_face.NAMES, experts=_EXPERTS)),
    ),
    Format(("qwen3moe",), _of_gguf, partial(sources_of, names=from_gguf.NAMES)),
)
