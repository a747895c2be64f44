"""Qwen3, dense: Llama with an RMS norm over each head's queries and keys."""

from dataclasses import replace
from functools import partial

from ..config import ModelConfig
from . import from_gguf, from_hugging_face
from .family import Family, Format
from .from_gguf import GGUFHeader
from .from_hugging_face import sliding_from
from .raw_config import Settings
from .tensor_names import sources_of


def _of_hugging_face(settings: Settings) -> ModelConfig:
    return replace(from_hugging_face.config_of(settings, "qwen3", kinds=sliding_from, head_dim=128), qk_norm=True)


def _of_gguf(header: GGUFHeader) -> ModelConfig:
    return replace(from_gguf.config_of(header, "qwen3"), qk_norm=True)


FAMILY = Family(
    Format(("qwen3",), _of_hugging_face, partial(sources_of, names=from_hugging_face.NAMES)),
    Format(("qwen3",), _of_gguf, partial(sources_of, names=from_gguf.NAMES)),
)
