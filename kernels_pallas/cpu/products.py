"""Products of few rows with weights as the decoder holds them: x [T, K] times w [K, N], to float32.

The weights are read where they lie, once for all rows: a piece of work is a strip of columns, whose sums stay in
registers while the rows of w pass by. K is cut into chunks of `CHUNK`, each chunk is summed in order by fused
multiply-adds from zero, and the chunks' sums are added in order. So a row's result depends on that row alone, whatever
the strips, the number of rows and the thread; only the level counts.

With BF16 instructions x is bfloat16, and two rows of w are multiplied at a time; else x is float32.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .frame import NUMBA, argument, data, result, room, set_word, size, word
from .kernel import Kernel, threads
from .levels import Level
from .vectors import F32, I16, I32, I64, Writer

CHUNK = 96  # even, and a divisor of many models' sizes
_AHEAD = 32  # rows of w that are asked for before they are needed
_LINE = 64

RUN = 24  # the most vectors of columns in a run
GROUP = 8  # rows of w that are read side by side; a divisor of CHUNK
_X, _W, _OUT, _ROWS, _DEPTH, _COLUMNS, _STRIPS, _STREAM = range(8)

# (x, bytes a row of x, w, bytes a row of w, out, bytes a row of out, depth, 1 if the sums are the first, columns)
_TILE_ARGUMENTS = 9


def product_float32(level: Level) -> Kernel:
    """Make the product of float32 x with float32 weights."""
    return _kernel(level, by_float32, x_bytes=4)


def product_bfloat16(level: Level) -> Kernel:
    """Make the product with bfloat16 weights, of bfloat16 x where the level has instructions for it, else float32."""
    if level.has_bf16:
        return _kernel(level, by_pairs, x_bytes=2)
    return _kernel(level, by_bfloat16, x_bytes=4)


def _kernel(level: Level, multiply: "Multiply", x_bytes: int) -> Kernel:
    top, vectors = (8, 3) if level.registers == 32 else (4, 3)
    if multiply is by_pairs:
        vectors = 2
    lanes, strip = level.lanes, level.lanes * vectors
    wide = row_blocks(level, top, vectors, False, multiply, x_bytes)
    narrow = row_blocks(level, top, 1, False, multiply, x_bytes)
    last = row_blocks(level, top, 1, True, multiply, x_bytes)

    is_float32 = multiply is by_float32
    stream = streams(level)

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        x, w = argument(frame, 0), argument(frame, 1)
        set_word(job, _X, data(x))
        set_word(job, _W, data(w))
        set_word(job, _OUT, data(result(frame, 0)))
        set_word(job, _ROWS, size(x, 0))
        set_word(job, _DEPTH, size(x, 1))
        columns = size(w, 1)
        set_word(job, _COLUMNS, columns)
        set_word(job, _STRIPS, columns // strip)
        set_word(job, _STREAM, 0)
        if is_float32 and size(x, 0) <= 8 and columns % lanes == 0 and size(x, 1) % GROUP == 0:
            vectors = columns // lanes
            pieces = max((vectors + RUN - 1) // RUN, min(threads(frame), vectors // 4))
            run = (vectors + pieces - 1) // pieces
            set_word(job, _STREAM, run)
            return (vectors + run - 1) // run
        return (columns + strip - 1) // strip

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        x, w, out = word(job, _X), word(job, _W), word(job, _OUT)
        rows, depth, columns = word(job, _ROWS), word(job, _DEPTH), word(job, _COLUMNS)
        run = word(job, _STREAM)
        if is_float32 and run > 0:
            vectors, first = min(run, columns // lanes - piece * run), piece * run * lanes * 4
            stream(x, rows, w + first, out + first, depth, columns, vectors)
            return
        column = piece * strip
        end = min(column + strip, columns)
        if piece < word(job, _STRIPS):
            wide(x, w, out, rows, depth, columns, column, lanes)
            return
        while end - column >= lanes:
            narrow(x, w, out, rows, depth, columns, column, lanes)
            column += lanes
        if column < end:
            last(x, w, out, rows, depth, columns, column, end - column)

    @njit(**NUMBA)
    def finish(job: int) -> None:
        return

    return Kernel(setup, work, finish)


def row_blocks(
    level: Level, top: int, vectors: int, is_partial: bool, multiply: "Multiply", x_bytes: int
) -> Callable[..., None]:
    """Make a function that computes a strip for all rows: `top` at a time, then 4, 2 and 1."""
    tile, tile4, tile2, tile1 = (make_tile(level, rows, vectors, is_partial, multiply) for rows in (top, 4, 2, 1))
    weight_bytes = 4 if multiply is by_float32 else 2
    is_eight = top == 8

    @njit(**NUMBA)
    def compute(x: int, w: int, out: int, rows: int, depth: int, columns: int, column: int, count: int) -> None:
        x_row, w_row, out_row = depth * x_bytes, columns * weight_bytes, columns * 4
        begin = 0
        while begin < depth:
            steps = min(CHUNK, depth - begin)
            is_first = types.int64(begin == 0)
            at_x, at_w, at_out = x + begin * x_bytes, w + begin * w_row + column * weight_bytes, out + column * 4
            left = rows
            while left >= top:
                tile(at_x, x_row, at_w, w_row, at_out, out_row, steps, is_first, count)
                at_x, at_out, left = at_x + top * x_row, at_out + top * out_row, left - top
            if is_eight and left >= 4:
                tile4(at_x, x_row, at_w, w_row, at_out, out_row, steps, is_first, count)
                at_x, at_out, left = at_x + 4 * x_row, at_out + 4 * out_row, left - 4
            if left >= 2:
                tile2(at_x, x_row, at_w, w_row, at_out, out_row, steps, is_first, count)
                at_x, at_out, left = at_x + 2 * x_row, at_out + 2 * out_row, left - 2
            if left >= 1:
                tile1(at_x, x_row, at_w, w_row, at_out, out_row, steps, is_first, count)
            begin += CHUNK

    return compute


def make_tile(level: Level, rows: int, vectors: int, is_partial: bool, multiply: "Multiply") -> Any:
    """Make the product of `rows` rows of x with a chunk of w, `vectors` vectors of columns or a part of one."""

    @intrinsic
    def tile(
        typing: Any, x: Any, x_row: Any, w: Any, w_row: Any, out: Any, out_row: Any, depth: Any, is_first: Any,
        count: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_row, w, w_row, out, out_row, depth, is_first, count = arguments
            write = Writer(builder, level.lanes)
            mask = write.first(count, level.lanes) if is_partial else None
            x_rows = [write.plus(x, write.times(x_row, row)) for row in range(rows)]
            sums = multiply(write, x_rows, w, w_row, depth, vectors, mask)
            starts = builder.icmp_signed("!=", is_first, write.number(0))
            for index, total in enumerate(sums):
                row, vector = divmod(index, vectors)
                place = write.plus(write.plus(out, write.times(out_row, row)), vector * level.lanes * 4)
                if mask is None:
                    before = write.load(place, write.vector, 4)
                else:
                    before = write.load_masked(place, write.vector, 4, mask)
                after = builder.select(starts, total, builder.fadd(before, total))
                write.store(after, place) if mask is None else write.store_masked(after, place, mask)
            return context.get_dummy_value()

        return types.void(*[types.int64] * _TILE_ARGUMENTS), code

    return tile


def streams(level: Level) -> Callable[..., None]:
    """Make a function that computes a run of columns for up to 8 rows of x, all of float32."""
    one, two, four, eight = (_stream(level, rows) for rows in (1, 2, 4, 8))

    @njit(**NUMBA)
    def stream(x: int, rows: int, w: int, out: int, depth: int, columns: int, vectors: int) -> None:
        if rows == 1:
            one(x, rows, w, out, depth, columns, vectors)
        elif rows == 2:
            two(x, rows, w, out, depth, columns, vectors)
        elif rows <= 4:
            four(x, rows, w, out, depth, columns, vectors)
        else:
            eight(x, rows, w, out, depth, columns, vectors)

    made: Callable[..., None] = stream
    return made


def _stream(level: Level, rows: int) -> Callable[..., None]:
    """Make a function that computes a run of columns for up to `rows` rows of x, all of float32.

    `GROUP` rows of w pass by at a time, as far as the run goes, and the sums lie in the nearest cache: memory is read
    in long runs, which is what counts where each weight is used a few times.
    """
    add, add_up, run_bytes = _add_rows(level, rows), _add_up(level), RUN * level.lanes * 4
    sums = room(rows * run_bytes)

    @njit(**NUMBA)
    def stream(x: int, count: int, w: int, out: int, depth: int, columns: int, vectors: int) -> None:
        fresh, row_bytes = sums(), columns * 4
        for begin in range(0, depth, CHUNK):
            for k in range(begin, min(begin + CHUNK, depth), GROUP):
                is_first = types.int64(k == begin)
                add(x + k * 4, depth * 4, count, w + k * row_bytes, row_bytes, fresh, is_first, vectors)
            for row in range(count):
                add_up(fresh + row * run_bytes, out + row * row_bytes, types.int64(begin == 0), vectors)

    made: Callable[..., None] = stream
    return made


def _add_up(level: Level) -> Any:
    """Write sums of a chunk to `out`, or add them to what is there if they are not the first."""

    @intrinsic
    def add_up(typing: Any, sums: Any, out: Any, is_first: Any, vectors: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, out, is_first, vectors = arguments
            write = Writer(builder, level.lanes)
            starts = builder.icmp_signed("!=", is_first, write.number(0))

            def step(index: Any, _: list[Any]) -> list[Any]:
                offset = write.times(index, level.lanes * 4)
                total, place = write.floats(write.plus(sums, offset)), write.plus(out, offset)
                write.store(builder.select(starts, total, builder.fadd(write.floats(place), total)), place)
                return []

            write.loop(vectors, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), code

    return add_up


def _add_rows(level: Level, rows: int) -> Any:
    """Add `GROUP` rows of w, each times its values of x, to sums in memory; a row of x too many is the last again."""

    @intrinsic
    def add(
        typing: Any, x: Any, x_row: Any, count: Any, w: Any, w_row: Any, sums: Any, is_first: Any, vectors: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_row, count, w, w_row, sums, is_first, vectors = arguments
            write = Writer(builder, level.lanes)
            starts = builder.icmp_signed("!=", is_first, write.number(0))
            of_w = [write.plus(w, write.times(w_row, k)) for k in range(GROUP)]
            last, factors = builder.sub(count, write.number(1)), []
            for row in range(rows):
                is_there = builder.icmp_signed(">", count, write.number(row))
                of_x = write.plus(x, builder.mul(x_row, builder.select(is_there, write.number(row), last)))
                factors.append([write.splat(write.load(write.plus(of_x, k * 4), F32, 4)) for k in range(GROUP)])

            def step(index: Any, _: list[Any]) -> list[Any]:
                offset = write.times(index, level.lanes * 4)
                weights = [write.floats(write.plus(place, offset)) for place in of_w]
                for place in of_w:
                    write.prefetch(write.plus(write.plus(place, offset), write.times(w_row, _AHEAD)))
                for row in range(rows):
                    place = write.plus(sums, write.plus(offset, row * RUN * level.lanes * 4))
                    total = builder.select(starts, *write.zeros(1), write.floats(place))
                    for factor, weight in zip(factors[row], weights, strict=True):
                        total = write.fma(factor, weight, total)
                    write.store(total, place)
                return []

            write.loop(vectors, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), code

    return add


# (writer, rows of x, w, bytes a row of w, depth, vectors, mask) -> the sums, row by row
type Multiply = Callable[[Writer, list[Any], Any, Any, Any, int, Any], list[Any]]


def by_float32(write: Writer, x_rows: list[Any], w: Any, w_row: Any, depth: Any, vectors: int, mask: Any) -> list[Any]:
    """Multiply one row of w at a time, all of float32: the sums of each row of x, in vectors of columns."""
    return _by_rows(write, x_rows, w, w_row, depth, vectors, mask, F32)


def by_bfloat16(write: Writer, x_rows: list[Any], w: Any, w_row: Any, depth: Any, vectors: int, mask: Any) -> list[Any]:
    """Multiply one row of w at a time, of bfloat16 that is widened, with float32 x."""
    return _by_rows(write, x_rows, w, w_row, depth, vectors, mask, I16)


def _by_rows(
    write: Writer, x_rows: list[Any], w: Any, w_row: Any, depth: Any, vectors: int, mask: Any, element: Any
) -> list[Any]:
    """Multiply one row of w at a time, of float32 or of bfloat16 that is widened, with float32 x."""
    item = 4 if element is F32 else 2
    width = write.lanes * item

    def step(k: Any, sums: list[Any]) -> list[Any]:
        place = write.plus(w, write.times(k, w_row))
        _prefetch(write, place, w_row, vectors * width)
        columns = [_load(write, write.plus(place, v * width), element, write.lanes, mask) for v in range(vectors)]
        columns = [column if element is F32 else write.widen(column) for column in columns]
        added = []
        for row, x in enumerate(x_rows):
            scalar = write.splat(write.load(write.plus(x, write.times(k, 4)), F32, 4))
            added += [write.fma(scalar, columns[v], sums[row * vectors + v]) for v in range(vectors)]
        return added

    return write.loop(depth, write.zeros(len(x_rows) * vectors), step)


def by_pairs(write: Writer, x_rows: list[Any], w: Any, w_row: Any, depth: Any, vectors: int, mask: Any) -> list[Any]:
    """Multiply two rows of w at a time with two bfloat16 values of each row of x; an odd last row with zeros."""
    builder, lanes = write.builder, write.lanes
    width = lanes * vectors

    def add(sums: list[Any], low: Any, high: Any, x_pairs: list[Any]) -> list[Any]:
        columns = [write.pairs(low, high, v * lanes) for v in range(vectors)]
        added = []
        for row, x_pair in enumerate(x_pairs):
            pair = builder.bitcast(write.splat(x_pair), ir.VectorType(I16, 2 * lanes))
            added += [write.dot_pairs(sums[row * vectors + v], pair, columns[v]) for v in range(vectors)]
        return added

    def step(k: Any, sums: list[Any]) -> list[Any]:
        place = write.plus(w, write.times(write.times(k, 2), w_row))
        _prefetch(write, place, w_row, width * 2)
        _prefetch(write, write.plus(place, w_row), w_row, width * 2)
        low, high = (_load(write, at, I16, width, mask) for at in (place, write.plus(place, w_row)))
        return add(sums, low, high, [write.load(write.plus(x, write.times(k, 4)), I32, 2) for x in x_rows])

    def odd(_: Any, sums: list[Any]) -> list[Any]:
        before = builder.sub(depth, write.number(1))
        low = _load(write, write.plus(w, write.times(before, w_row)), I16, width, mask)
        halves = [write.load(write.plus(x, write.times(before, 2)), I16, 2) for x in x_rows]
        return add(sums, low, ir.Constant(low.type, None), [builder.zext(half, I32) for half in halves])

    sums = write.zeros(len(x_rows) * vectors)
    sums = write.loop(builder.lshr(depth, ir.Constant(I64, 1)), sums, step)
    return write.loop(builder.and_(depth, ir.Constant(I64, 1)), sums, odd)


def _load(write: Writer, place: Any, element: Any, count: int, mask: Any) -> Any:
    kind, align = ir.VectorType(element, count), 4 if element is F32 else 2
    return write.load(place, kind, align) if mask is None else write.load_masked(place, kind, align, mask)


def _prefetch(write: Writer, place: Any, w_row: Any, width: int) -> None:
    ahead = write.plus(place, write.times(w_row, _AHEAD))
    for line in range(0, width, _LINE):
        write.prefetch(write.plus(ahead, line))
