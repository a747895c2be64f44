"""Twinmesh: LLM inference in JAX with prefill and decode on meshes of their own.

The public names load on first use, so that `import twinmesh` is instant and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM
    from .engine.config import Topology
    from .engine.errors import EngineError
    from .engine.llm import LLM
    from .engine.outputs import CompletionOutput, Logprob, RequestOutput, Score, TextDelta
    from .engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "TextDelta",
    "Topology",
]
_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "outputs",
    "EngineError": "errors",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "Score": "outputs",
    "TextDelta": "outputs",
    "Topology": "config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".engine.{_HOMES[name]}", __name__), name)
