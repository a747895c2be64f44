"""Lists the work of a kernel call, computed on the device from lengths: small arrays, the same for all layers.

Work is cut at absolute positions, so that a request's result does not depend on the other requests.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_NEVER = 2**31 - 1
_ALIGNMENT = 8  # rows of a tile as the tensor cores require it


def ceil_div[T: (int, Array)](amount: T, unit: int) -> T:
    """Divide and round up."""
    return -(-amount // unit)


class Splits(NamedTuple):
    """The splits of all requests, one after the other, at most U."""

    start: Array  # [R + 1]: request r has splits start[r] to start[r + 1] - 1
    items: Array  # [U, 3]: request, first visible token and the one after the last; rows from start[R] on are unused


def split_work(kv_len: Array, window: int | None, split: int, capacity: int) -> Splits:
    """Cut each request's visible tokens at multiples of `split`; `capacity` is the most tokens a request can have."""
    requests = kv_len.shape[0]
    most = ceil_div(capacity, split)
    if window is not None:
        most = min(most, (window - 2 + split) // split + 1)
    first = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0)
    count = jnp.where(kv_len > 0, (kv_len + split - 1) // split - first // split, 0)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    index = jnp.arange(requests * most, dtype=jnp.int32)
    request = jnp.sum(index[:, None] >= start[None, 1:], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, requests - 1)
    cut = (first[request] // split + index - start[request]) * split
    begin, end = jnp.maximum(cut, first[request]), jnp.minimum(cut + split, kv_len[request])
    return Splits(start, jnp.stack([request, begin, end], axis=1))


class Piece(NamedTuple):
    """One piece of a prefill call's work, rows of q that attend to a request's tokens; or the columns of a list."""

    request: Array
    row: Array  # index in q of the piece's first row
    skip: Array  # the first rows of the piece, which belong to other pieces
    own: Array  # the rows after those, which the piece computes
    position: Array  # of the first row, skipped or not: row i of the piece is at position + i
    low: Array  # the first token that the piece attends to
    high: Array  # the token after the last that the piece attends to
    length: Array  # tokens of the request

    @classmethod
    def read(cls, columns: Any) -> "Piece":
        """Read a piece from a Pallas reference to its row of the list."""
        return cls(*(columns[i] for i in range(len(cls._fields))))

    def tiles(self, tile: int) -> tuple[Array, Array]:
        """Find the first tile of tokens, and the one after the last."""
        first = lax.div(self.low, tile)
        return first, jnp.where(self.high > self.low, lax.div(self.high + (tile - 1), tile), first)

    def clean(self, tile: int, window: int | None, rows: int) -> tuple[Array, Array]:
        """Find the tiles that need no mask: those from the first to before the second of the returned indices.

        They are visible to all of the `rows` rows that a piece can have.
        """
        first, last = self.tiles(tile)
        first_own = self.position + self.skip
        to = jnp.clip(lax.div(jnp.maximum(first_own + 1, 0), tile), first, last)
        if window is None:
            return first, to
        edge = jnp.maximum(self.position + rows - window, 0)
        return jnp.clip(lax.div(edge + (tile - 1), tile), first, to), to

    def unwritten_from(self, page_size: int) -> Array:
        """Find the token past which a tile may hold values that were never written, and may be NaN."""
        last_page = lax.div(self.length - 1, page_size) * page_size
        reads_them = (self.high > last_page) & (lax.rem(self.length, page_size) != 0)
        return jnp.where(reads_them, last_page, _NEVER)


def chunk_work(kv_len: Array, q_start: Array, window: int | None, tokens: int, rows: int) -> tuple[Array, Array]:
    """Cut packed chunks into pieces of `rows` query rows, and sort those that attend to the most tokens first.

    The rows past the last chunk count as one more chunk, without visible tokens. Pieces begin at multiples of 8,
    because copies of tiled rows do, so the first piece of a chunk may begin with rows of other pieces. So may a piece
    that would end past `tokens`, which is a multiple of 8 and at least `rows`.

    Returns:
        [U, 8] int32, rows of `Piece`, and the number of pieces [1] int32; later rows are unused.
    """
    requests = kv_len.shape[0]
    begin = q_start  # [R + 1]; the last entry is that of the rows past the chunks
    stop = jnp.append(q_start[1:], jnp.int32(tokens))
    length = jnp.append(kv_len, jnp.int32(0))
    aligned = begin // _ALIGNMENT * _ALIGNMENT
    pieces = jnp.where(stop > begin, (stop - aligned + rows - 1) // rows, 0)
    end = jnp.cumsum(pieces, dtype=jnp.int32)
    most = (tokens + (requests + 1) * (_ALIGNMENT + rows - 2)) // rows
    index = jnp.arange(most, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.sum(index[:, None] >= end[None], axis=1, dtype=jnp.int32), requests)
    cut = aligned[chunk] + (index - end[chunk] + pieces[chunk]) * rows
    own = jnp.maximum(cut, begin[chunk])
    row = jnp.clip(cut, 0, tokens - rows)
    count = jnp.clip(jnp.minimum(stop[chunk], cut + rows) - own, 0, rows)
    position = length[chunk] - (stop[chunk] - own)  # of the first own row
    high = jnp.clip(position + count, 0, length[chunk])
    low = jnp.zeros_like(high) if window is None else jnp.clip(position - window + 1, 0, high)
    piece = Piece(
        request=jnp.minimum(chunk, requests - 1),
        row=row,
        skip=own - row,
        own=count,
        position=position - (own - row),
        low=low,
        high=high,
        length=length[chunk],
    )
    visible = jnp.where(index < end[-1], high - low, -1)
    return jnp.stack(piece, axis=1)[jnp.argsort(-visible)], end[-1:]
