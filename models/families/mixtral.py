"""Mixtral: Mistral with experts, and without a window unless config.json has one. Its GGUF files say "llama".

Files name an expert's gate w1, its up projection w3 and its down projection w2.
"""

from dataclasses import replace
from functools import partial

from ..config import Experts, ModelConfig
from . import from_hugging_face
from .family import Family, Format
from .from_hugging_face import all_sliding
from .raw_config import Settings
from .tensor_names import ExpertNames, sources_of

_EXPERTS = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{}.w1",
    up="block_sparse_moe.experts.{}.w3",
    down="block_sparse_moe.experts.{}.w2",
)


def _of_hugging_face(settings: Settings) -> ModelConfig:
    config = from_hugging_face.config_of(
        settings, "mixtral", kinds=all_sliding, theta=1_000_000.0, reads=("num_local_experts",)
    )
    count, per_token = settings.integer("num_local_experts", 8), settings.integer("num_experts_per_tok", 2)
    return replace(config, experts=Experts(count, per_token))


FAMILY = Family(
    Format(
        names=("mixtral",),
        config=_of_hugging_face,
        sources=partial(sources_of, names=replace(from_hugging_face.NAMES, experts=_EXPERTS)),
    ),
    gguf=None,
)
