"""Mistral: Llama with a sliding window in every layer, unless config.json says null. Its GGUF files say "llama".

Without the key the window is 4,096 tokens, as in the first Mistral 7B and in Hugging Face's `MistralConfig`.
"""

from functools import partial

from . import from_hugging_face, llama
from .family import Family, Format
from .from_hugging_face import FULL, SLIDING
from .raw_config import Settings

_WINDOW = 4096


def _kinds(settings: Settings, layers: int) -> list[str]:
    return [FULL if settings.get("sliding_window", _WINDOW) is None else SLIDING] * layers


FAMILY = Family(
    Format(
        names=("mistral",),
        config=partial(from_hugging_face.config_of, family="mistral", kinds=_kinds, window=_WINDOW),
        sources=llama.FAMILY.hugging_face.sources,
    ),
    gguf=None,
)
