"""Mistral: Llama with a sliding window in every layer, where config.json has one. Its GGUF files are of "llama"."""

from functools import partial

from . import from_hugging_face, llama
from .family import Family, Format
from .from_hugging_face import all_sliding

FAMILY = Family(
    Format(
        names=("mistral",),
        config=partial(from_hugging_face.config_of, family="mistral", kinds=all_sliding),
        sources=llama.FAMILY.hugging_face.sources,
    ),
    gguf=None,
)
