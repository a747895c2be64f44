"""Paged attention of chunks of prompts, over pages where they lie.

A piece of work is a few tokens of a chunk, for the query heads of one key/value head. Keys pass by in blocks at
absolute positions: a block's keys are laid across and its values widened on the stack, and then a few rows at a time
are scored, weighed and summed. A row that sees nothing of a block is not touched by it, and what a row does not see has
a weight of 0; so a row's bits depend on its own request and position alone, however prompts are cut into chunks.
Scores, softmax and sums are float32.

Only tokens that a request holds are read: unused slots of a page may hold anything. Not here: softcaps.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float32, njit, types
from numba.extending import intrinsic

from .attention import ITEM, LOWEST, has_scales, load_widened, scale_of, token_row
from .frame import NUMBA, argument, attribute, data, load, result, room, set_word, size, store, word
from .kernel import Kernel
from .levels import Level
from .products import by_float32, make_tile
from .vectors import Writer

_BLOCK = 128  # tokens of a block; a multiple of all levels' lanes
_NUMBERS = 12_288  # of a piece's queries: tokens times query heads of a key/value head, times head_dim
_STATE = 4  # numbers of a row: the largest score, the sum of weights, and what sums so far are to be multiplied by

# The words that `attention.token_row` reads are where decode's calls have them.
(
    _Q, _K, _V, _TABLE, _LENGTHS, _FIRST, _SINK, _START, _OUT, _REQUESTS, _QUERY_HEADS, _PAGES, _PAGE, _KV_HEADS,
    _TOKENS, _WINDOW, _UNUSED, _POOL, _K_SCALES, _V_SCALES,
) = range(20)  # fmt: skip


def prefill(level: Level, keys: str, values: str, head_dim: int) -> Kernel:
    """Make attention over pages of these kinds, with heads of this length."""
    attend, row, most = _blocks(level, head_dim, keys, values), head_dim * 4, _NUMBERS // head_dim // 8 * 8
    queries, sums, states = room(most * row), room(most * row), room(most * _STATE * 4)
    take, begin_rows, give = _take(row), _begin_rows(row), _give(row)

    @njit(**NUMBA)
    def setup(frame: int, job: int) -> int:
        q, k = argument(frame, 0), argument(frame, 1)
        for index in range(8):
            set_word(job, _Q + index, data(argument(frame, index)))
        set_word(job, _K_SCALES, data(argument(frame, 8)))
        set_word(job, _V_SCALES, data(argument(frame, 9)))
        out = data(result(frame, 0))
        set_word(job, _OUT, out)
        set_word(job, _REQUESTS, size(argument(frame, 4), 0))
        set_word(job, _QUERY_HEADS, size(q, 1))
        set_word(job, _PAGES, size(argument(frame, 3), 1))
        set_word(job, _POOL, size(k, 0))
        set_word(job, _PAGE, size(k, 1))
        set_word(job, _KV_HEADS, size(k, 2))
        set_word(job, _WINDOW, attribute(frame, 0))
        set_word(job, _TOKENS, max(1, min(most // (size(q, 1) // size(k, 2)), 64)))
        pieces = 0
        for request in range(word(job, _REQUESTS)):
            pieces += _tiles(job, request)
        for place in range(_begin(job, word(job, _REQUESTS)) * size(q, 1) * row, size(q, 0) * size(q, 1) * row, 4):
            store(out + place, float32(0))
        return pieces * size(k, 2)

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        kv_heads, query_heads, tokens = word(job, _KV_HEADS), word(job, _QUERY_HEADS), word(job, _TOKENS)
        group, head = query_heads // kv_heads, piece % kv_heads
        request, index = 0, piece // kv_heads
        while index >= _tiles(job, request):
            index -= _tiles(job, request)
            request += 1
        begin = _begin(job, request) + index * tokens
        count = min(tokens, _begin(job, request + 1) - begin)
        length = types.int64(load(word(job, _LENGTHS) + request * 4, types.int32))
        position = length - _begin(job, request + 1) + begin
        q, out, state = queries(), sums(), states()
        first = (begin * query_heads + head * group) * row  # of the piece's rows, in q and in the result
        take(word(job, _Q) + first, query_heads * row, count, group, q)
        begin_rows(word(job, _SINK) + head * group * 4, count, group, out, state)
        attend(job, request, head, position, count, group, q, out, state)
        give(word(job, _OUT) + first, query_heads * row, count, group, out, state)

    @njit(**NUMBA)
    def finish(job: int) -> None:
        return

    return Kernel(setup, work, finish)


def _take(row: int) -> Callable[..., None]:
    """Make a function that lays a piece's queries beside each other, and zeros up to a multiple of 8 rows."""

    @njit(**NUMBA)
    def take(place: int, token_bytes: int, tokens: int, group: int, to: int) -> None:
        for token in range(tokens):
            for offset in range(0, group * row, 4):
                store(to + token * group * row + offset, load(place + token * token_bytes + offset, types.float32))
        for extra in range(tokens * group * row, (tokens * group + 7) // 8 * 8 * row, 4):
            store(to + extra, float32(0))

    made: Callable[..., None] = take
    return made


def _begin_rows(row: int) -> Callable[..., None]:
    """Make a function that begins a piece's sums, and its rows' states with their heads' sinks."""

    @njit(**NUMBA)
    def begin_rows(sinks: int, tokens: int, group: int, out: int, state: int) -> None:
        for offset in range(0, (tokens * group + 7) // 8 * 8 * row, 4):
            store(out + offset, float32(0))
        for at in range(tokens * group):
            sink = load(sinks + at % group * 4, types.float32)
            store(state + at * _STATE * 4, max(sink, float32(LOWEST)))
            store(state + at * _STATE * 4 + 4, float32(1 if sink > LOWEST else 0))

    made: Callable[..., None] = begin_rows
    return made


def _give(row: int) -> Callable[..., None]:
    """Make a function that writes a piece's sums, each over its sum of weights, where they belong."""

    @njit(**NUMBA)
    def give(place: int, token_bytes: int, tokens: int, group: int, out: int, state: int) -> None:
        for at in range(tokens * group):
            total = load(state + at * _STATE * 4 + 4, types.float32)
            inverse = float32(1) / total if total != 0 else float32(0)
            to = place + at // group * token_bytes + at % group * row
            for offset in range(0, row, 4):
                store(to + offset, load(out + at * row + offset, types.float32) * inverse)

    made: Callable[..., None] = give
    return made


@njit(**NUMBA)
def _begin(job: int, request: int) -> int:
    """Return a chunk's first row."""
    return types.int64(load(word(job, _START) + request * 4, types.int32))


@njit(**NUMBA)
def _tiles(job: int, request: int) -> int:
    """Count the pieces of a chunk for each key/value head."""
    tokens = word(job, _TOKENS)
    return (_begin(job, request + 1) - _begin(job, request) + tokens - 1) // tokens


def _blocks(level: Level, head_dim: int, keys: str, values: str) -> Callable[..., None]:
    """Make a function that takes a piece's rows through all blocks that they see."""
    rows = 8 if level.registers == 32 else 4
    vectors = 1 if head_dim % (2 * level.lanes) else 2  # of columns in a tile
    tile = make_tile(level, rows, vectors, False, by_float32)
    lay, scale, soften, row = _lay(level, head_dim, keys, values), _scale(level, head_dim), _soften(level), head_dim * 4
    k_item, v_item = ITEM[keys], ITEM[values]
    across_on_stack, wide_on_stack, scores = room(head_dim * _BLOCK * 4), room(_BLOCK * row), room(rows * _BLOCK * 4)
    lanes, strip, line = level.lanes, level.lanes * vectors, _BLOCK * 4

    @njit(**NUMBA)
    def attend(
        job: int, request: int, head: int, position: int, tokens: int, group: int, q: int, out: int, state: int
    ) -> None:
        numbers, window = word(job, _KV_HEADS) * head_dim, word(job, _WINDOW)
        k, v = word(job, _K) + head * head_dim * k_item, word(job, _V) + head * head_dim * v_item
        stop = min(position + tokens, word(job, _PAGES) * word(job, _PAGE))
        first = max(position - window + 1, 0) if window > 0 else 0
        across, wide, scored = across_on_stack(), wide_on_stack(), scores()
        for begin in range(first // _BLOCK * _BLOCK, stop, _BLOCK):
            end = min(begin + _BLOCK, stop)
            for token in range(begin, begin + _BLOCK):
                is_seen = types.int64(first <= token < end)
                at_row = token_row(job, request, token) if is_seen else types.int64(0)
                k_scale = scale_of(job, word(job, _K_SCALES), at_row, head)
                v_scale = scale_of(job, word(job, _V_SCALES), at_row, head)
                column, line_of = across + (token - begin) * 4, wide + (token - begin) * row
                key, number = k + at_row * numbers * k_item, v + at_row * numbers * v_item
                lay(key, number, k_scale, v_scale, column, line_of, is_seen)
            for base in range(0, tokens * group, rows):
                last = min(base + rows, tokens * group) - 1
                most = min(position + last // group + 1, end) - begin
                if most <= 0:
                    continue
                for column in range(0, most, strip):
                    tile(q + base * row, row, across + column * 4, line, scored + column * 4, line, head_dim, 1, strip)
                for index in range(rows):
                    at = position + (base + index) // group
                    high = min(at + 1, end) - begin if base + index <= last else types.int64(0)
                    low = max(at - window + 1 - begin, 0) if window > 0 else types.int64(0)
                    weights, own = scored + index * line, state + (base + index) * _STATE * 4
                    if high > low:
                        for hidden in range(0, low):
                            store(weights + hidden * 4, float32(LOWEST))
                        for hidden in range(high, (high + lanes - 1) // lanes * lanes):
                            store(weights + hidden * 4, float32(LOWEST))
                        soften(weights, (high + lanes - 1) // lanes, own)
                        rescale = load(own + 8, types.float32)
                        if rescale != 1:
                            scale(out + (base + index) * row, rescale)
                    else:
                        low = high = types.int64(0)
                    for hidden in range(0, low):
                        store(weights + hidden * 4, float32(0))
                    for hidden in range(high, most):
                        store(weights + hidden * 4, float32(0))
                for column in range(0, head_dim, strip):
                    tile(scored, line, wide + column * 4, row, out + base * row + column * 4, row, most, 0, strip)

    return attend


def _lay(level: Level, head_dim: int, keys: str, values: str) -> Any:
    """Lay a token's key down a column, and its value along a row; zeros if it is not seen."""

    @intrinsic
    def lay(typing: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, column: Any, row: Any, is_seen: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            k, v, k_scale, v_scale, column, row, is_seen = arguments
            write = Writer(builder, level.lanes)

            def loaded(place: Any, kind: str, scale: Any) -> Any:
                numbers = load_widened(write, place, kind)
                if not has_scales(kind):
                    return numbers
                return builder.fmul(numbers, write.splat(write.load(scale, ir.FloatType(), 4)))

            with builder.if_else(builder.icmp_signed("!=", is_seen, write.number(0))) as (seen, hidden):
                for part, is_given in ((seen, True), (hidden, False)):
                    with part:
                        for at in range(0, head_dim, level.lanes):
                            key, value = write.zeros(2)
                            if is_given:
                                key = loaded(write.plus(k, at * ITEM[keys]), keys, k_scale)
                                value = loaded(write.plus(v, at * ITEM[values]), values, v_scale)
                            write.store(value, write.plus(row, at * 4))
                            for lane in range(level.lanes):
                                number = builder.extract_element(key, ir.Constant(ir.IntType(32), lane))
                                write.store(number, write.plus(column, (at + lane) * _BLOCK * 4))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), code

    return lay


def _scale(level: Level, head_dim: int) -> Any:
    """Multiply a row's sums."""

    @intrinsic
    def scale(typing: Any, row: Any, factor: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, factor = arguments
            write = Writer(builder, level.lanes)
            for at in range(0, head_dim, level.lanes):
                place = write.plus(row, at * 4)
                write.store(builder.fmul(write.floats(place), write.splat(factor)), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32), code

    return scale


def _soften(level: Level) -> Any:
    """Turn vectors of a row's scores into weights where they lie, and bring the row's state up to date."""

    @intrinsic
    def soften(typing: Any, scores: Any, count: Any, state: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            scores, count, state = arguments
            write = Writer(builder, level.lanes)

            def at(index: Any) -> Any:
                return write.plus(scores, write.times(index, level.lanes * 4))

            before = write.splat(write.load(state, ir.FloatType(), 4))
            (peaks,) = write.loop(count, [before], lambda i, peaks: [write.largest(write.floats(at(i)), peaks[0])])
            peak = write.peak(peaks)
            of_all = write.splat(peak)

            def weigh(index: Any, totals: list[Any]) -> list[Any]:
                weights = write.exp(builder.fsub(write.floats(at(index)), of_all))
                write.store(weights, at(index))
                return [builder.fadd(totals[0], weights)]

            (totals,) = write.loop(count, write.zeros(1), weigh)
            first = ir.Constant(ir.IntType(32), 0)
            rescale = builder.extract_element(write.exp(builder.fsub(before, of_all)), first)
            total = builder.fmul(write.load(write.plus(state, 4), ir.FloatType(), 4), rescale)
            write.store(peak, state)
            write.store(builder.fadd(total, write.sum(totals)), write.plus(state, 4))
            write.store(rescale, write.plus(state, 8))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), code

    return soften
