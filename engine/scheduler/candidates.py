"""Which splits of a pool's meshes the planner predicts: all of a small pool, of a large one a grid and those near.

So there are never more than a hundred or so, whatever the number of meshes.
"""

from itertools import permutations

from .observations import Split

_ALL = 8  # meshes of a pool of which every split is looked at; the parts of a larger one that a grid counts in


def candidates(now: Split) -> list[Split]:
    """List the splits to predict, the one now among them."""
    meshes = sum(now)
    parts = min(meshes, _ALL)
    counts = [round(part * meshes / parts) for part in range(parts + 1)]
    grid = [
        Split(prefill, decode, meshes - prefill - decode)
        for prefill in counts
        for decode in counts
        if prefill + decode <= meshes
    ]
    return list(dict.fromkeys(split for split in (now, *near(now), *grid) if split.is_served))


def near(split: Split) -> list[Split]:
    """List the splits that 1, 2, 4, ... meshes of one role taking another lead to."""
    found = []
    for source, target in permutations(range(len(split)), 2):
        moved = 1
        while moved <= split[source]:
            counts = list(split)
            counts[source] -= moved
            counts[target] += moved
            found.append(Split(*counts))
            moved *= 2
    return [one for one in found if one.is_served]
