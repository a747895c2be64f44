"""Which mesh takes a request. Small pure policies over loads; the scheduler measures the loads. No JAX here."""

from collections.abc import Callable, Iterable


def least_loaded[M](candidates: Iterable[M], load: Callable[[M], tuple[int, ...]]) -> M | None:
    """The candidate with the least outstanding work, the first of them on a tie; None when there is no candidate."""
    return min(candidates, key=load, default=None)
