"""Twinmesh: LLM inference in JAX with prefill and decode on meshes of their own.

The public names load on first use, so that `import twinmesh` is instant and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.api.async_llm import AsyncLLM, AsyncLLMEngine
    from .engine.api.beam_search import BeamSearchOutput, BeamSearchParams
    from .engine.api.llm import LLM
    from .engine.api.outputs import CompletionOutput, Logprob, RequestOutput, Score, TextDelta
    from .engine.api.plan_topology import plan_topology
    from .engine.api.pooling_params import PoolingParams
    from .engine.api.sampling_params import RequestOutputKind, SamplingParams
    from .engine.api.vllm_args import AsyncEngineArgs, EngineArgs, FlexibleArgumentParser
    from .engine.api.vllm_engine import LLMEngine
    from .engine.api.vllm_metrics import Counter, Gauge, Histogram, Vector
    from .engine.chat.answers import ToolCall
    from .engine.errors import EngineError, Overloaded
    from .engine.protocol.service import SLO
    from .engine.structured.params import StructuredOutputsParams
    from .engine.topology import Topology

    __version__: str

__all__ = [
    "LLM",
    "SLO",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Counter",
    "EngineArgs",
    "EngineError",
    "FlexibleArgumentParser",
    "Gauge",
    "Histogram",
    "LLMEngine",
    "Logprob",
    "Overloaded",
    "PoolingParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Score",
    "StructuredOutputsParams",
    "TextDelta",
    "ToolCall",
    "Topology",
    "Vector",
    "plan_topology",
]
_MODULES = {
    "AsyncEngineArgs": "api.vllm_args",
    "AsyncLLMEngine": "api.async_llm",
    "BeamSearchParams": "api.beam_search",
    "BeamSearchOutput": "api.beam_search",
    "Counter": "api.vllm_metrics",
    "EngineArgs": "api.vllm_args",
    "FlexibleArgumentParser": "api.vllm_args",
    "Gauge": "api.vllm_metrics",
    "Histogram": "api.vllm_metrics",
    "LLMEngine": "api.vllm_engine",
    "Vector": "api.vllm_metrics",
    "LLM": "api.llm",
    "AsyncLLM": "api.async_llm",
    "CompletionOutput": "api.outputs",
    "EngineError": "errors",
    "Logprob": "api.outputs",
    "Overloaded": "errors",
    "PoolingParams": "api.pooling_params",
    "RequestOutput": "api.outputs",
    "RequestOutputKind": "api.sampling_params",
    "SLO": "protocol.service",
    "SamplingParams": "api.sampling_params",
    "Score": "api.outputs",
    "StructuredOutputsParams": "structured.params",
    "TextDelta": "api.outputs",
    "ToolCall": "chat.answers",
    "Topology": "topology",
    "plan_topology": "api.plan_topology",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".engine.{_MODULES[name]}", __name__), name)


def _version() -> str:
    """Return that of the installed package, or of a checkout that runs without being installed."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("twinmesh")
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
        return str(project["version"])
