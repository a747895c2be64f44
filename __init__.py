"""Twinmesh: LLM inference in JAX with prefill and decode on meshes of their own.

The public names load on first use, so that `import twinmesh` is instant and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.api.async_llm import AsyncLLM
    from .engine.api.llm import LLM
    from .engine.api.outputs import CompletionOutput, Logprob, RequestOutput, Score, TextDelta
    from .engine.api.plan_topology import plan_topology
    from .engine.api.sampling_params import RequestOutputKind, SamplingParams
    from .engine.chat.answers import ToolCall
    from .engine.errors import EngineError, Overloaded
    from .engine.protocol.service import SLO
    from .engine.structured.params import StructuredOutputsParams
    from .engine.topology import Topology

    __version__: str

__all__ = [
    "LLM",
    "SLO",
    "AsyncLLM",
    "CompletionOutput",
    "EngineError",
    "Logprob",
    "Overloaded",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Score",
    "StructuredOutputsParams",
    "TextDelta",
    "ToolCall",
    "Topology",
    "plan_topology",
]
_MODULES = {
    "LLM": "api.llm",
    "AsyncLLM": "api.async_llm",
    "CompletionOutput": "api.outputs",
    "EngineError": "errors",
    "Logprob": "api.outputs",
    "Overloaded": "errors",
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
