"""How many pages a mesh's memory holds, and refusals that show the arithmetic."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..topology import MeshSpec
from .memory_needs import page_bytes, state_bytes, transit_bytes


def size_pools(
    config: EngineConfig, models: Sequence[ModelConfig], budgets: Sequence[int], part: int, asked_len: int | None
) -> tuple[EngineConfig, list[PoolSize]]:
    """Size each mesh's pools. A max_model_len that was asked for must fit; one that was not shrinks until it does.

    Args:
        config: as asked for, with the model's length where none was.
        models: of each mesh, as it runs it.
        budgets: bytes of each mesh for KV pages and staging.
        part: hand-offs on their way get a `part`-th.
        asked_len: the max_model_len that was asked for, if any.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    sizes = [(budget, page_bytes(m, config.page_size, config.dtype)) for budget, m in zip(budgets, models, strict=True)]
    if asked_len is None:
        fits = min(longest_that_fits(budget, per_page, config, part) for budget, per_page in set(sizes))
        config = replace(config, max_model_len=fits)
    meshes = config.topology.meshes
    kinds = [(budget, per_page, spec) for (budget, per_page), spec in zip(sizes, meshes, strict=True)]
    # Once for each kind: there may be thousands of meshes.
    fitting = {kind: pool_that_fits(*kind[:2], config, kind[2], part) for kind in dict.fromkeys(kinds)}
    pools = [fitting[kind] for kind in kinds]
    if not config.has_handoffs:
        return config, pools
    return config, [
        replace(
            pool,
            staging_bytes=pool.staging_bytes + transit_bytes(config) * spec.tp,
            state_bytes=state_bytes() * spec.tp,
        )
        for pool, spec in zip(pools, meshes, strict=True)
    ]


def in_steps(size: int) -> int:
    """Round down to four binary digits: programs depend on the pools' sizes, and a start on a machine that is a little
    fuller than last time is to find them compiled."""
    return size - size % (1 << max(0, size.bit_length() - 4))


def longest_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig, part: int) -> int:
    """Find the longest `max_model_len`, at most the config's, of which one request fits into `budget` bytes,
    of which staging is a `part`-th.

    One page's tokens where not even those fit: `pool_that_fits` then says so.
    """

    def fits(pages: int) -> bool:
        shorter = replace(config, max_model_len=max(2, pages * config.page_size))
        return _staging(budget, per_page, shorter, part) + _request(per_page, shorter) <= budget

    pages = bisect_right(range(1, config.max_pages + 1), False, key=lambda pages: not fits(pages))
    return min(config.max_model_len, max(2, max(1, pages) * config.page_size))


def pool_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec, part: int) -> PoolSize:
    """Divide `budget` bytes between a mesh's pools, one per cache group, and the staging of hand-offs.

    `per_page`: bytes of one page of each group. A request of `max_model_len` needs `EngineConfig.most_pages` of each;
    the groups get pages in that proportion, for as many such requests as fit, at most one per slot.

    Staging is a `part`-th, but holds one to eight requests of full length: with room for one only, short requests wait
    for each other's transfers, and each wait is as long as a prefill step.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    staging, request = _staging(budget, per_page, config, part), _request(per_page, config)
    rest = budget - staging
    if rest < request:
        raise ValueError(_too_small(budget, staging, per_page, config, spec))
    needed = [config.most_pages(window) for window in config.windows]
    pages = tuple(min(config.max_num_seqs * count, rest * count // request) for count in needed)
    return PoolSize(pages, per_page, staging)


def least_budget(per_page: tuple[int, ...], config: EngineConfig, part: int) -> int:
    """Return the fewest bytes with which `pool_that_fits` finds room for one request of the config's length."""
    request = _request(per_page, config)
    most = request + _staging(part * request, per_page, config, part) + _staging(0, per_page, config, part)
    budgets = range(request, 2 * most + part)
    found = bisect_left(budgets, True, key=lambda budget: budget - _staging(budget, per_page, config, part) >= request)
    return budgets[min(found, len(budgets) - 1)]


def _staging(budget: int, per_page: tuple[int, ...], config: EngineConfig, part: int) -> int:
    """Return bytes of `budget` that hand-offs on their way may take."""
    if not config.has_handoffs:
        return 0
    caps = [config.pages_to_send(window) for window in config.windows]
    whole = PoolSize((), per_page, 0).transfer_bytes(config.max_pages, caps)
    return min(max(budget // part, whole), 8 * whole)


def _request(per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Return bytes of pages that one request of full length needs."""
    return sum(config.most_pages(window) * size for window, size in zip(config.windows, per_page, strict=True))


def _too_small(budget: int, staging: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec) -> str:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f} MiB"

    parts = " + ".join(
        f"{config.most_pages(window)} pages of {mib(size)}"
        for window, size in zip(config.windows, per_page, strict=True)
    )
    aside = f", {mib(staging)} of them for hand-offs" if staging else ""
    return (
        f"the KV cache of the {spec.role} mesh does not fit: there are {mib(budget)}{aside}, and one request of "
        f"max_model_len={config.max_model_len} needs {parts} ({config.page_size} tokens each) = "
        f"{mib(_request(per_page, config))}: lower max_model_len, or raise kv_cache_bytes."
    )
