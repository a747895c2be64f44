"""Products of few rows with weights that lie by output, as an embedding does: x [T, K] times w [N, K], to float32.

This is a model's head: long, and read once for all rows. A register holds values along K, so every sum is `lanes` sums,
added at the end in a fixed order: a result's bits depend on its row of x and its row of w alone.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .frame import NUMBA, argument, data, result, set_word, size, word
from .kernel import Kernel
from .levels import Level
from .vectors import F32, I16, I64, Writer

_PIECE = 96  # rows of w; a multiple of all tiles' rows of w
_AHEAD = 512  # bytes of a row of w that are asked for before they are needed

_X, _W, _OUT, _ROWS, _DEPTH, _COLUMNS = range(6)

# (x, bytes a row of x, w, bytes a row of w, out, bytes a row of out, depth)
_TILE_ARGUMENTS = 7


def score_float32(level: Level) -> Kernel:
    """Make the product of float32 x with float32 weights."""
    return _kernel(level, _Float32, x_bytes=4)


def score_bfloat16(level: Level) -> Kernel:
    """Make the product with bfloat16 weights, of bfloat16 x where the level has instructions for it, else float32."""
    return _kernel(level, _Pairs, x_bytes=2) if level.has_bf16 else _kernel(level, _BFloat16, x_bytes=4)


def _kernel(level: Level, way: "type[_Way]", x_bytes: int) -> Kernel:
    tall = 6 if level.registers == 32 else 2  # rows of w in a tile
    wide, narrow = _row_blocks(level, tall, way, x_bytes), _row_blocks(level, 1, way, x_bytes)
    weight_bytes = way.weight_bytes

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        x, w = argument(frame, 0), argument(frame, 1)
        set_word(job, _X, data(x))
        set_word(job, _W, data(w))
        set_word(job, _OUT, data(result(frame, 0)))
        set_word(job, _ROWS, size(x, 0))
        set_word(job, _DEPTH, size(x, 1))
        set_word(job, _COLUMNS, size(w, 0))
        return (size(w, 0) + _PIECE - 1) // _PIECE

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        x, out, rows, depth = word(job, _X), word(job, _OUT), word(job, _ROWS), word(job, _DEPTH)
        out_row = word(job, _COLUMNS) * 4
        begin = piece * _PIECE
        left = min(_PIECE, word(job, _COLUMNS) - begin)
        w, out = word(job, _W) + begin * depth * weight_bytes, out + begin * 4
        while left >= tall:
            wide(x, w, out, rows, depth, out_row)
            w, out, left = w + tall * depth * weight_bytes, out + tall * 4, left - tall
        while left >= 1:
            narrow(x, w, out, rows, depth, out_row)
            w, out, left = w + depth * weight_bytes, out + 4, left - 1

    @njit(**NUMBA)
    def finish(job: int) -> None:
        return

    return Kernel(setup, work, finish)


def _row_blocks(level: Level, tall: int, way: "type[_Way]", x_bytes: int) -> Callable[..., None]:
    """Make a function that multiplies `tall` rows of w with all rows of x: four at a time, then 2 and 1."""
    tile4, tile2, tile1 = (_tile(level, rows, tall, way) for rows in (4, 2, 1))
    weight_bytes = way.weight_bytes

    @njit(**NUMBA)
    def compute(x: int, w: int, out: int, rows: int, depth: int, out_row: int) -> None:
        x_row, w_row = depth * x_bytes, depth * weight_bytes
        left = rows
        while left >= 4:
            tile4(x, x_row, w, w_row, out, out_row, depth)
            x, out, left = x + 4 * x_row, out + 4 * out_row, left - 4
        if left >= 2:
            tile2(x, x_row, w, w_row, out, out_row, depth)
            x, out, left = x + 2 * x_row, out + 2 * out_row, left - 2
        if left >= 1:
            tile1(x, x_row, w, w_row, out, out_row, depth)

    return compute


def _tile(level: Level, rows: int, tall: int, way: "type[_Way]") -> Any:
    """Make the product of `rows` rows of x with `tall` rows of w."""

    @intrinsic
    def tile(typing: Any, x: Any, x_row: Any, w: Any, w_row: Any, out: Any, out_row: Any, depth: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_row, w, w_row, out, out_row, depth = arguments
            write = Writer(builder, level.lanes)
            x_rows = [write.plus(x, write.times(x_row, row)) for row in range(rows)]
            w_rows = [write.plus(w, write.times(w_row, row)) for row in range(tall)]
            sums = _dots(write, way(write), x_rows, w_rows, depth)
            for index, total in enumerate(sums):
                row, column = divmod(index, tall)
                place = write.plus(write.plus(out, write.times(out_row, row)), column * 4)
                write.store(write.sum(total), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * _TILE_ARGUMENTS), code

    return tile


def _dots(write: Writer, way: "_Way", x_rows: list[Any], w_rows: list[Any], depth: Any) -> list[Any]:
    """Multiply rows by rows: a vector of sums for each pair, row of x by row of x."""
    builder = write.builder

    def add(sums: list[Any], index: Any, mask: Any) -> list[Any]:
        places = [write.plus(w, write.times(index, way.step * way.weight_bytes)) for w in w_rows]
        for place in places:
            write.prefetch(write.plus(place, _AHEAD))
        columns = [way.weights(place, mask) for place in places]
        added = []
        for row, x in enumerate(x_rows):
            values = way.values(write.plus(x, write.times(index, way.step * way.x_bytes)), mask)
            added += [way.add(sums[row * len(w_rows) + c], values, column) for c, column in enumerate(columns)]
        return added

    sums = write.zeros(len(x_rows) * len(w_rows))
    whole = builder.sdiv(depth, write.number(way.step))
    sums = write.loop(whole, sums, lambda index, sums: add(sums, index, None))
    rest = builder.sub(depth, write.times(whole, way.step))
    mask = write.first(rest, way.step)
    has_rest = builder.zext(builder.icmp_signed(">", rest, write.number(0)), I64)
    return write.loop(has_rest, sums, lambda _, sums: add(sums, whole, mask))


class _Way:
    """How values of one kind are loaded and multiplied, `step` of a row at a time."""

    weight_bytes = x_bytes = 4

    def __init__(self, write: Writer) -> None:
        self.write, self.step = write, write.lanes

    def load(self, place: Any, element: Any, mask: Any) -> Any:
        """Load `step` elements, or those that the mask has."""
        kind, align = ir.VectorType(element, self.step), 4 if element is F32 else 2
        if mask is None:
            return self.write.load(place, kind, align)
        return self.write.load_masked(place, kind, align, mask)

    def weights(self, place: Any, mask: Any) -> Any:
        """Load weights."""
        return self.load(place, F32, mask)

    def values(self, place: Any, mask: Any) -> Any:
        """Load values of x."""
        return self.load(place, F32, mask)

    def add(self, total: Any, values: Any, weights: Any) -> Any:
        """Add products to a vector of sums."""
        return self.write.fma(values, weights, total)


class _Float32(_Way):
    """Both are float32."""


class _BFloat16(_Way):
    """Weights are bfloat16 and widened, x is float32."""

    weight_bytes = 2

    def weights(self, place: Any, mask: Any) -> Any:
        """Load weights."""
        return self.write.widen(self.load(place, I16, mask))


class _Pairs(_Way):
    """Both are bfloat16, and pairs of them are multiplied at once."""

    weight_bytes = x_bytes = 2

    def __init__(self, write: Writer) -> None:
        super().__init__(write)
        self.step = 2 * write.lanes

    def weights(self, place: Any, mask: Any) -> Any:
        """Load weights."""
        return self.load(place, I16, mask)

    values = weights

    def add(self, total: Any, values: Any, weights: Any) -> Any:
        """Add products to a vector of sums."""
        return self.write.dot_pairs(total, values, weights)
