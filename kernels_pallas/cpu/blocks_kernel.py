"""The kernel of products with quantised weights: activations are rounded by blocks, then come the tiles.

x [rows, k] times W [n, k], for any number of rows. The calling thread rounds the activations into a buffer of the
call's, groups of 8 rows of which a block's are one record; a piece of work is a few tiles of outputs, each of which
stays in the first-level cache while all rows pass by. A block of a row is rounded as llama.cpp does it, by `amax / 127`
to 8 bits, or likewise to 16, and its sum is kept for the value that stands for 0 and for the mins, so that sums of
products are of integers, exact.

A row with a value that is not finite gives results that are not finite.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..block_tiles import BLOCK, LAYOUTS, OUTPUTS
from .blocks_code import HIGH, Code, Form, Values, block_of_floats, block_of_integers
from .blocks_records import NUMBER_BYTES, PER_ROW, ROWS
from .frame import NUMBA, argument, attribute, data, result, set_word, size, word
from .jobs import MOST_ROWS
from .kernel import Kernel, threads
from .levels import Level
from .vectors import F32, I8, I16, I32

_PIECES = 2  # of a call, for each thread: a thread reads the longer without a jump the fewer there are
_PROMPT_PIECES = 16  # likewise of a call over many rows, which computes more than it reads
_ALONE = 1024  # blocks of tiles, once more for each row, that take less time (5 us) than another thread to come
_X, _BLOCKS, _ROWS, _COLUMNS, _VALUES, _SCALES, _MINS, _OUT, _OUT_BYTES, _TILES = range(10)
_LARGEST = {"int8": 127.0, "int16": 127.0 * (HIGH + 1)}  # that a number may become
_SIGN_LESS = 0x7FFFFFFF


def product(level: Level, layout: int, activations: int) -> Kernel:
    """Make the product.

    Args:
        level: of the CPU.
        layout: which of `LAYOUTS` the weights have, by number.
        activations: which of `NUMBER_BYTES` they become, by number.
    """
    form = Form(list(LAYOUTS.values())[layout], level, list(NUMBER_BYTES)[activations])
    block_bytes, group_blocks = form.block_bytes, form.blocks
    scales_bytes, mins_bytes = (form.groups * OUTPUTS * each for each in (form.scale_bytes, form.min_bytes))
    has_mins, parts = form.layout.has_mins, OUTPUTS // level.lanes
    prepare, multiply = prepare_rows(form), row_groups(form)

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        x, values = argument(frame, 0), argument(frame, 1)
        rows, blocks, tiles, at = size(x, 0), size(x, 1) // BLOCK, size(values, 0), data(result(frame, 1))
        set_word(job, _X, at)
        set_word(job, _BLOCKS, blocks)
        set_word(job, _ROWS, rows)
        set_word(job, _COLUMNS, size(result(frame, 0), 1))
        set_word(job, _VALUES, data(values))
        set_word(job, _SCALES, data(argument(frame, 2)))
        if has_mins:
            set_word(job, _MINS, data(argument(frame, 3)))
        set_word(job, _OUT, data(result(frame, 0)))
        set_word(job, _OUT_BYTES, attribute(frame, 0))
        most = threads(frame) * (_PIECES if rows <= MOST_ROWS else _PROMPT_PIECES)
        each = tiles if tiles * blocks * (rows + 1) < _ALONE else (tiles + most - 1) // most
        set_word(job, _TILES, each)
        prepare(data(x), attribute(frame, 1), rows, blocks, at)
        pieces: int = (tiles + each - 1) // each
        return pieces

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        blocks, columns, each = word(job, _BLOCKS), word(job, _COLUMNS), word(job, _TILES)
        x, rows, out, out_bytes = word(job, _X), word(job, _ROWS), word(job, _OUT), word(job, _OUT_BYTES)
        for tile in range(piece * each, min((piece + 1) * each, (columns + OUTPUTS - 1) // OUTPUTS)):
            values = word(job, _VALUES) + tile * blocks * block_bytes
            scales = word(job, _SCALES) + tile * (blocks // group_blocks) * scales_bytes
            mins = types.int64(0)
            if has_mins:
                mins = word(job, _MINS) + tile * (blocks // group_blocks) * mins_bytes
            for part in range(parts):
                multiply(x, rows, blocks, values, scales, mins, part, out, out_bytes, columns, tile * OUTPUTS)

    @njit(**NUMBA)
    def finish(job: int) -> None:
        return

    return Kernel(setup, work, finish)


def row_groups(form: Form) -> Callable[..., None]:
    """Make a function that multiplies a part of a tile, a register's outputs, with all rows: 8, 4, 2 or 1 at a time."""
    tile8, tile4, tile2, tile1 = (_tile(form, rows) for rows in (8, 4, 2, 1))
    record, lanes, scale_bytes, min_bytes = form.record_bytes, form.level.lanes, form.scale_bytes, form.min_bytes
    row_bytes, is_tall = form.row_bytes, form.level.registers >= 32

    @njit(**NUMBA)
    def multiply(
        records: int, rows: int, blocks: int, values: int, scales: int, mins: int, part: int, to: int, out_bytes: int,
        columns: int, column: int,
    ) -> None:  # fmt: skip
        column += part * lanes
        count = min(columns - column, lanes)
        if count <= 0:
            return
        scales, mins = scales + part * lanes * scale_bytes, mins + part * lanes * min_bytes
        out_row = columns * out_bytes
        for group in range((rows + ROWS - 1) // ROWS):
            x = records + group * blocks * record
            of_rows = x + ROWS * row_bytes
            out = to + group * ROWS * out_row + column * out_bytes
            left = min(rows - group * ROWS, ROWS)
            if is_tall and left == 8:
                tile8(values, scales, mins, part, x, of_rows, blocks, out, out_row, out_bytes, count)
                left = 0
            while left >= 4:
                tile4(values, scales, mins, part, x, of_rows, blocks, out, out_row, out_bytes, count)
                x, of_rows, out, left = x + 4 * row_bytes, of_rows + 16, out + 4 * out_row, left - 4
            if left >= 2:
                tile2(values, scales, mins, part, x, of_rows, blocks, out, out_row, out_bytes, count)
                x, of_rows, out, left = x + 2 * row_bytes, of_rows + 8, out + 2 * out_row, left - 2
            if left >= 1:
                tile1(values, scales, mins, part, x, of_rows, blocks, out, out_row, out_bytes, count)

    made: Callable[..., None] = multiply
    return made


def _tile(form: Form, rows: int) -> Any:
    """Make the product of `rows` rows of a group with one register's outputs of a tile."""
    add_block = block_of_floats if form.is_float else block_of_integers
    scales_bytes, mins_bytes = (form.groups * OUTPUTS * each for each in (form.scale_bytes, form.min_bytes))
    shift = form.blocks.bit_length() - 1

    @intrinsic
    def tile(
        typing: Any, values: Any, scales: Any, mins: Any, part: Any, x: Any, of_rows: Any, blocks: Any, out: Any,
        out_row: Any, out_bytes: Any, count: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, scales, mins, part, x, of_rows, blocks, out, out_row, out_bytes, count = arguments
            code = Code(builder, form)

            def step(block: Any, totals: list[Any]) -> list[Any]:
                here = Values(code, code.plus(values, code.times(block, form.block_bytes)), part)
                group, activations = builder.lshr(block, code.number(shift)), code.times(block, form.record_bytes)
                places = (
                    code.plus(scales, code.times(group, scales_bytes)),
                    code.plus(mins, code.times(group, mins_bytes)),
                )
                at_x = (code.plus(x, activations), code.plus(of_rows, activations))
                return add_block(code, here, *places, *at_x, list(totals))

            totals = code.loop(blocks, code.zeros(rows), step)
            with builder.if_else(builder.icmp_signed("==", out_bytes, code.number(4))) as (is_float, is_half):
                with is_float:
                    _store(code, totals, out, out_row, count)
                with is_half:
                    _store(code, [_to_bfloat16(code, total) for total in totals], out, out_row, count)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return tile


def _store(code: Code, totals: list[Any], out: Any, out_row: Any, count: Any) -> None:
    """Store the first `count` outputs of each row."""
    builder, align = code.builder, 4 if totals[0].type == code.vector else 2
    places = [code.plus(out, code.times(out_row, row)) for row in range(len(totals))]
    with builder.if_else(builder.icmp_signed("==", count, code.number(code.lanes))) as (is_whole, is_cut):
        with is_whole:
            for total, place in zip(totals, places, strict=True):
                code.store(total, place, align)
        with is_cut:
            mask = code.first(count, code.lanes)
            kind = f"v{code.lanes}{'f32' if align == 4 else 'i16'}"
            for total, place in zip(totals, places, strict=True):
                pointer = builder.inttoptr(place, I8.as_pointer())
                align_of = ir.Constant(I32, align)
                code.intrinsic(f"llvm.masked.store.{kind}.p0", ir.VoidType(), total, pointer, align_of, mask)


def _to_bfloat16(code: Code, values: Any) -> Any:
    """Round float32 to bfloat16, ties to even, as 16-bit words; NaN stays NaN."""
    builder, one = code.builder, code.same(1)
    words = code.words_of(values)
    odd = builder.and_(builder.lshr(words, code.same(16)), one)
    rounded = builder.lshr(builder.add(builder.add(words, code.same(0x7FFF)), odd), code.same(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.trunc(builder.select(is_nan, code.same(0x7FC0), rounded), ir.VectorType(I16, code.lanes))


def prepare_rows(form: Form) -> Callable[..., None]:
    """Make a function that writes the records of all rows."""
    record, row_bytes, per_row = form.record_bytes, form.row_bytes, 0 if form.is_float else 4
    wide, half = _record(form, 4), _record(form, 2)

    @njit(**NUMBA)
    def prepare(x: int, x_bytes: int, rows: int, blocks: int, records: int) -> None:
        for row in range(rows):
            group, place = row // ROWS, row % ROWS
            at = records + group * blocks * record + place * row_bytes
            of_row = records + group * blocks * record + ROWS * row_bytes + place * per_row
            if x_bytes == 4:
                wide(x + row * blocks * BLOCK * 4, blocks, at, of_row)
            else:
                half(x + row * blocks * BLOCK * 2, blocks, at, of_row)

    made: Callable[..., None] = prepare
    return made


def _record(form: Form, x_bytes: int) -> Any:
    """Make what writes one row into its records."""

    @intrinsic
    def write_row(typing: Any, x: Any, blocks: Any, at: Any, of_row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, blocks, at, of_row = arguments
            code = Code(builder, form)

            def step(block: Any, _: list[Any]) -> list[Any]:
                start = code.plus(x, code.times(block, BLOCK * x_bytes))
                floats = [
                    _floats(code, code.plus(start, first * x_bytes), x_bytes) for first in range(0, BLOCK, code.lanes)
                ]
                offset = code.times(block, form.record_bytes)
                if form.is_float:
                    for index, vector in enumerate(floats):
                        code.store(vector, code.plus(code.plus(at, offset), 4 * code.lanes * index))
                else:
                    _round(code, floats, code.plus(at, offset), code.plus(of_row, offset))
                return []

            code.loop(blocks, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return write_row


def _floats(code: Code, address: Any, x_bytes: int) -> Any:
    if x_bytes == 4:
        return code.load(address, code.vector, 4)
    return code.widen(code.load(address, ir.VectorType(I16, code.lanes), 2))


def _round(code: Code, floats: list[Any], at: Any, of_row: Any) -> None:
    """Round a block of a row, and write its scale and what its sum is needed for."""
    form, builder, largest = code.form, code.builder, _LARGEST[code.form.activations]
    # As integers, so that NaN is the largest and shows in the scale.
    sizes = [builder.and_(code.words_of(vector), code.same(_SIGN_LESS)) for vector in floats]
    amax = builder.bitcast(_reduce(code, "umax", sizes), F32)
    inverse = builder.fdiv(ir.Constant(F32, largest), amax)
    is_zero = builder.fcmp_ordered("oeq", amax, ir.Constant(F32, 0.0))
    inverse = builder.select(is_zero, ir.Constant(F32, 0.0), inverse)
    scale = builder.fmul(amax, ir.Constant(F32, 1 / largest))
    code.store(scale, of_row)
    whole = []
    for index, vector in enumerate(floats):
        scaled = builder.fmul(vector, code.splat(inverse))
        nearest = _nearest(code, scaled)
        whole.append(builder.fptosi(nearest, code.words))
        place, low = code.plus(at, code.lanes * index), whole[-1]
        if form.activations == "int16":
            high = builder.fptosi(_nearest(code, builder.fmul(nearest, _same(code, 1 / HIGH))), code.words)
            _store_bytes(code, high, place)
            place, low = code.plus(place, BLOCK), builder.sub(low, builder.mul(high, code.same(HIGH)))
        _store_bytes(code, low, place)
    for group in range(form.groups):
        some = whole[len(whole) * group // form.groups : len(whole) * (group + 1) // form.groups]
        place = code.plus(of_row, PER_ROW * (1 + group))
        total = _reduce(code, "add", some)
        if form.layout.has_mins:
            code.store(builder.fmul(scale, builder.sitofp(total, F32)), place)
        elif form.zero and not form.is_signed:
            code.store(builder.mul(total, ir.Constant(I32, -form.zero)), place)


def _nearest(code: Code, values: Any) -> Any:
    return code.intrinsic(f"llvm.rint.v{code.lanes}f32", code.vector, values)


def _same(code: Code, value: float) -> Any:
    return ir.Constant(code.vector, [value] * code.lanes)


def _store_bytes(code: Code, words: Any, place: Any) -> None:
    code.store(code.builder.trunc(words, ir.VectorType(I8, code.lanes)), place, 1)


def _reduce(code: Code, name: str, vectors: list[Any]) -> Any:
    """Reduce words to one by `add` or `umax`."""
    builder, first = code.builder, vectors[0]
    for vector in vectors[1:]:
        if name == "add":
            first = builder.add(first, vector)
        else:
            first = builder.select(builder.icmp_unsigned(">", first, vector), first, vector)
    return code.intrinsic(f"llvm.vector.reduce.{name}.v{code.lanes}i32", I32, first)
