"""Models: configuration, the decoder, checkpoints and tokenizers.

`load` gives a model without an engine, for research; it and its `LoadedModel` are imported on their first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loaded import LoadedModel, load

__all__ = ["LoadedModel", "load"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".loaded", __name__), name)
