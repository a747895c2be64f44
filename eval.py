"""`twinmesh.eval`: lm-evaluation-harness on an engine, with the extra `eval`. The class is `engine/evaluation`'s."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.evaluation.harness import TwinmeshLM

__all__ = ["TwinmeshLM"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .engine.host.extras import need

    need("lm_eval", "eval", "twinmesh.eval")
    from .engine.evaluation import harness

    return getattr(harness, name)
