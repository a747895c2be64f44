"""The kernels of products with a stack of matrices: groups of rows, each with a matrix of its own, which is read in
place.

x [M, k] holds the rows of the first matrix, those of the second, and so on; `sizes` says how many each has. A piece of
work is some columns of one matrix for all of its rows, so that a matrix without rows costs nothing and both cores work
on the same or on different ones. Inner loops and their order of sums are those of `products.py` and `blocks_kernel.py`:
a row's bits are those that it has alone.

Rows past the sum of the sizes are neither read nor written.
"""

from numba import njit, types

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS
from .blocks_code import Form
from .blocks_kernel import prepare_rows, row_groups
from .blocks_records import NUMBER_BYTES, ROWS
from .frame import NUMBA, argument, attribute, data, load, result, set_word, size, word
from .kernel import Kernel, threads
from .levels import Level
from .products import GROUP, RUN, Multiply, by_bfloat16, by_float32, by_pairs, row_blocks, streams

_PIECES = 8  # of a call, for each thread, of matrices with few and many rows: the last to end is waited for
_X, _SIZES, _W, _OUT, _DEPTH, _COLUMNS, _EACH, _OF_ONE = range(8)
# Of quantised weights besides: `_W` are their values, `_DEPTH` counts blocks, and `_EACH` tiles.
_TILES, _SCALES, _MINS, _OUT_BYTES = range(8, 12)


@njit(**NUMBA)
def _rows(sizes: int, matrix: int) -> int:
    return types.int64(load(sizes + matrix * 4, types.int32))


@njit(**NUMBA)
def _used(sizes: int, matrices: int) -> int:
    """Count the matrices that have rows."""
    found = 0
    for matrix in range(matrices):
        found += _rows(sizes, matrix) > 0
    return found


@njit(**NUMBA)
def _matrix(sizes: int, place: int) -> int:
    """Find a matrix by its place among those that have rows."""
    matrix = 0
    while True:
        if _rows(sizes, matrix) > 0:
            if place == 0:
                return matrix
            place -= 1
        matrix += 1


@njit(**NUMBA)
def _groups_before(sizes: int, matrix: int, of: int) -> int:
    """Count the groups of `of` rows that earlier matrices fill, each its own; with 1 their rows."""
    found = 0
    for earlier in range(matrix):
        found += (_rows(sizes, earlier) + of - 1) // of
    return found


def stack_float32(level: Level) -> Kernel:
    """Make the product of float32 x with a stack of float32 matrices."""
    return _floats(level, by_float32, x_bytes=4)


def stack_bfloat16(level: Level) -> Kernel:
    """Make the product with bfloat16 matrices; x is bfloat16 where the level has instructions for it, else float32."""
    return _floats(level, by_pairs, x_bytes=2) if level.has_bf16 else _floats(level, by_bfloat16, x_bytes=4)


def _floats(level: Level, multiply: Multiply, x_bytes: int) -> Kernel:
    top, vectors = (8 if level.registers == 32 else 4), (2 if multiply is by_pairs else 3)
    lanes, strip = level.lanes, level.lanes * vectors
    wide, narrow, last = (
        row_blocks(level, top, count, is_part, multiply, x_bytes)
        for count, is_part in ((vectors, False), (1, False), (1, True))
    )
    is_float32, stream = multiply is by_float32, streams(level)
    weight_bytes = 4 if is_float32 else 2

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        x, sizes, w = argument(frame, 0), argument(frame, 1), argument(frame, 2)
        set_word(job, _X, data(x))
        set_word(job, _SIZES, data(sizes))
        set_word(job, _W, data(w))
        set_word(job, _OUT, data(result(frame, 0)))
        set_word(job, _DEPTH, size(x, 1))
        set_word(job, _COLUMNS, size(w, 2))
        used, columns = _used(data(sizes), size(sizes, 0)), size(w, 2)
        if used == 0:
            return 0
        of_one = (threads(frame) * _PIECES + used - 1) // used
        # Whole strips, so that only a matrix's last piece has a narrower one, and no more than a run.
        each = min((columns + of_one - 1) // of_one, RUN * lanes)
        each = (each + strip - 1) // strip * strip
        set_word(job, _EACH, each)
        set_word(job, _OF_ONE, (columns + each - 1) // each)
        pieces: int = used * ((columns + each - 1) // each)
        return pieces

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        sizes, of_one, each = word(job, _SIZES), word(job, _OF_ONE), word(job, _EACH)
        depth, columns, matrix = word(job, _DEPTH), word(job, _COLUMNS), _matrix(sizes, piece // of_one)
        rows, before = _rows(sizes, matrix), _groups_before(sizes, matrix, 1)
        x = word(job, _X) + before * depth * x_bytes
        out = word(job, _OUT) + before * columns * 4
        w = word(job, _W) + matrix * depth * columns * weight_bytes
        column = piece % of_one * each
        end = min(column + each, columns)
        if is_float32 and rows <= 8 and columns % lanes == 0 and depth % GROUP == 0:
            stream(x, rows, w + column * 4, out + column * 4, depth, columns, (end - column) // lanes)
            return
        while end - column >= strip:
            wide(x, w, out, rows, depth, columns, column, lanes)
            column += strip
        while end - column >= lanes:
            narrow(x, w, out, rows, depth, columns, column, lanes)
            column += lanes
        if column < end:
            last(x, w, out, rows, depth, columns, column, end - column)

    return Kernel(setup, work, _finish)


def stack_blocks(level: Level, layout: int, activations: int) -> Kernel:
    """Make the product with a stack of quantised matrices; parameters as of `blocks_kernel.product`."""
    form = Form(list(LAYOUTS.values())[layout], level, list(NUMBER_BYTES)[activations])
    block_bytes, group_blocks = form.block_bytes, form.blocks
    scales_bytes, mins_bytes = (form.groups * OUTPUTS * each for each in (form.scale_bytes, form.min_bytes))
    has_mins, parts, record = form.layout.has_mins, OUTPUTS // level.lanes, form.record_bytes
    prepare, multiply = prepare_rows(form), row_groups(form)

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        x, sizes, values = argument(frame, 0), argument(frame, 1), argument(frame, 2)
        matrices, tiles, blocks = size(values, 0), size(values, 1), size(values, 2)
        records = data(result(frame, 1))
        set_word(job, _X, records)
        set_word(job, _SIZES, data(sizes))
        set_word(job, _W, data(values))
        set_word(job, _SCALES, data(argument(frame, 3)))
        if has_mins:
            set_word(job, _MINS, data(argument(frame, 4)))
        set_word(job, _OUT, data(result(frame, 0)))
        set_word(job, _OUT_BYTES, attribute(frame, 0))
        set_word(job, _DEPTH, blocks)
        set_word(job, _TILES, tiles)
        set_word(job, _COLUMNS, size(result(frame, 0), 1))
        used = _used(data(sizes), matrices)
        if used == 0:
            return 0
        of_one = min((threads(frame) * _PIECES + used - 1) // used, tiles)
        each = (tiles + of_one - 1) // of_one
        set_word(job, _EACH, each)
        set_word(job, _OF_ONE, (tiles + each - 1) // each)
        x_bytes, source = attribute(frame, 1), data(x)
        for matrix in range(matrices):
            rows = _rows(data(sizes), matrix)
            if rows > 0:
                prepare(source, x_bytes, rows, blocks, records)
                source += rows * blocks * BLOCK * x_bytes
                records += (rows + ROWS - 1) // ROWS * blocks * record
        pieces: int = used * ((tiles + each - 1) // each)
        return pieces

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        sizes, of_one, each = word(job, _SIZES), word(job, _OF_ONE), word(job, _EACH)
        blocks, tiles, matrix = word(job, _DEPTH), word(job, _TILES), _matrix(sizes, piece // of_one)
        rows, columns, out_bytes = _rows(sizes, matrix), word(job, _COLUMNS), word(job, _OUT_BYTES)
        x = word(job, _X) + _groups_before(sizes, matrix, ROWS) * blocks * record
        out = word(job, _OUT) + _groups_before(sizes, matrix, 1) * columns * out_bytes
        first = piece % of_one * each
        for tile in range(first, min(first + each, tiles)):
            at = (matrix * tiles + tile) * blocks
            of_scales = at // group_blocks
            values, scales = word(job, _W) + at * block_bytes, word(job, _SCALES) + of_scales * scales_bytes
            mins = types.int64(0)
            if has_mins:
                mins = word(job, _MINS) + of_scales * mins_bytes
            for part in range(parts):
                multiply(x, rows, blocks, values, scales, mins, part, out, out_bytes, columns, tile * OUTPUTS)

    return Kernel(setup, work, _finish)


@njit(**NUMBA)
def _finish(job: int) -> None:
    return
