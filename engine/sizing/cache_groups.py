"""Cache groups: layers with the same attention window share a pool of pages and page tables."""

from typing import NamedTuple

from ...models.config import ModelConfig


class Group(NamedTuple):
    """A cache group: the layers that share an attention window."""

    window: int | None  # in tokens; None: the layers attend to all tokens
    layers: tuple[int, ...]  # indices of the layers


def groups(model: ModelConfig) -> tuple[Group, ...]:
    """List the cache groups in the order of their first layers; `EngineConfig.windows` are their windows."""
    windows = dict.fromkeys(spec.window for spec in model.layers)
    return tuple(
        Group(window, tuple(index for index, spec in enumerate(model.layers) if spec.window == window))
        for window in windows
    )
