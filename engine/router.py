"""Small pure policies: how much of a prompt a step takes. No state, no JAX here."""


def chunk_length(start: int, stop: int, budget: int, chunk_size: int, *, aligned: bool) -> int:
    """How many of the tokens `start` to `stop` - 1 go into a step that has room for `budget` more; 0: none.

    `aligned`: chunks end at absolute multiples of `chunk_size` and are never cut shorter to fit a step.
    """
    if not aligned:
        return min(stop - start, budget)
    length = min(stop, (start // chunk_size + 1) * chunk_size) - start
    return length if length <= budget else 0
