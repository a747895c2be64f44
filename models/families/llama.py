"""Llama 2 and 3, and models of the same architecture: SmolLM2, and in GGUF Mistral and Mixtral, which the converter
calls llama.

llama.cpp's converter stores the rows of Q and K permuted, so that rotary pairs are neighbours (2i, 2i + 1); the decoder
rotates halves (i, i + D / 2). Llama 3.1's rope scaling is a tensor of factors in GGUF.
"""

from functools import partial

from . import from_gguf, from_hugging_face
from .family import Family, Format
from .tensor_names import sources_of

FAMILY = Family(
    Format(
        names=("llama",),
        config=partial(from_hugging_face.config_of, family="llama"),
        sources=partial(sources_of, names=from_hugging_face.NAMES),
    ),
    Format(
        names=("llama",),
        config=partial(from_gguf.config_of, family="llama", has_experts=True),
        sources=partial(sources_of, names=from_gguf.NAMES, rotary_pairs=True),
    ),
)
