"""Paged attention of one new token per request, over pages where they lie.

A request's visible tokens are cut into splits at absolute multiples of a length that the caller chooses, and a piece
of work is one split of one request, for all heads. It leaves a softmax of its own: the weighted sum of values, the
largest score and the sum of weights; after all pieces a request's splits are put together in their order. So a row's
bits depend on its request alone. Scores, softmax and sums are float32, in registers along head_dim.

8-bit keys and values come with a scale for each token and head, which scores and weights are multiplied by; scales of
channels are the caller's business.

Only tokens that a request holds are read: unused slots of a page may hold anything. Not here: softcaps.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float32, njit, types
from numba.extending import intrinsic

from .frame import NUMBA, argument, attribute, data, load, result, room, set_word, size, store, word
from .kernel import Kernel
from .levels import Level
from .vectors import F32, I8, I16, Writer

MOST_TOKENS = 128  # that are looked at at a time; a multiple of all levels' lanes
_MOST_QUERIES = 4  # that share a pass over a head's keys
_LINE = 64
LOWEST = -1e30  # below all scores, and finite

(
    _Q, _K, _V, _TABLE, _LENGTHS, _FIRST, _SINK, _OUT, _PARTS, _REQUESTS, _QUERY_HEADS, _PAGES, _PAGE, _KV_HEADS, _MOST,
    _WINDOW, _SPLIT, _POOL, _K_SCALES, _V_SCALES,
) = range(20)  # fmt: skip
ITEM = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}  # bytes of a number of each kind


def has_scales(kind: str) -> bool:
    """Return whether pages of a kind have a scale for each token and head."""
    return ITEM[kind] == 1


def decode(level: Level, keys: str, values: str, head_dim: int) -> Kernel:
    """Make attention over pages of these kinds, with heads of this length."""
    # A part is head_dim sums, the largest score and the sum of weights.
    part = (head_dim + 2) * 4
    attend = _query_blocks(level, head_dim, keys, values)
    fold, put_together = _combinations(level, head_dim)
    part_on_stack = room(part)

    @njit(**NUMBA)
    def work(job: int, piece: int) -> None:
        request, index = 0, piece
        while index >= _splits(job, request):
            index -= _splits(job, request)
            request += 1
        length, split = _length(job, request), word(job, _SPLIT)
        first = _first_token(job, request)
        begin = (first // split + index) * split
        end = min(begin + split, length)
        start = begin = max(begin, first)
        query_heads, kv_heads = word(job, _QUERY_HEADS), word(job, _KV_HEADS)
        group = query_heads // kv_heads
        q = word(job, _Q) + request * query_heads * head_dim * 4
        place = word(job, _PARTS) + (request * word(job, _MOST) + index) * query_heads * part
        fresh = part_on_stack()
        while begin < end:
            stop = min((begin // MOST_TOKENS + 1) * MOST_TOKENS, end)
            for head in range(kv_heads):
                at_q, at = q + head * group * head_dim * 4, place + head * group * part
                if begin == start:
                    attend(job, request, head, begin, stop, group, at_q, at)
                    continue
                for query in range(group):
                    attend(job, request, head, begin, stop, 1, at_q + query * head_dim * 4, fresh)
                    fold(at + query * part, fresh)
            begin = stop

    @njit(**NUMBA)
    def finish(job: int) -> None:
        query_heads = word(job, _QUERY_HEADS)
        for request in range(word(job, _REQUESTS)):
            for head in range(query_heads):
                sink = load(word(job, _SINK) + head * 4, types.float32)
                out = word(job, _OUT) + (request * query_heads + head) * head_dim * 4
                place = word(job, _PARTS) + (request * word(job, _MOST) * query_heads + head) * part
                put_together(place, query_heads * part, _splits(job, request), sink, out)

    return Kernel(_setup, work, finish)


@njit(**NUMBA)
def _setup(frame: int, job: int) -> int:
    """Write the job's words; returns the number of pieces, a split of a request each."""
    q, k, table = argument(frame, 0), argument(frame, 1), argument(frame, 3)
    for index in range(7):
        set_word(job, _Q + index, data(argument(frame, index)))
    set_word(job, _K_SCALES, data(argument(frame, 7)))
    set_word(job, _V_SCALES, data(argument(frame, 8)))
    set_word(job, _OUT, data(result(frame, 0)))
    set_word(job, _PARTS, data(result(frame, 1)))
    set_word(job, _REQUESTS, size(q, 0))
    set_word(job, _QUERY_HEADS, size(q, 1))
    set_word(job, _PAGES, size(table, 1))
    set_word(job, _POOL, size(k, 0))
    set_word(job, _PAGE, size(k, 1))
    set_word(job, _KV_HEADS, size(k, 2))
    set_word(job, _MOST, size(result(frame, 1), 1))
    set_word(job, _SPLIT, attribute(frame, 0))
    set_word(job, _WINDOW, attribute(frame, 1))
    pieces = 0
    for request in range(size(q, 0)):
        pieces += _splits(job, request)
    return pieces


@njit(**NUMBA)
def _length(job: int, request: int) -> int:
    """Return a request's tokens, no more than its pages hold."""
    return min(types.int64(load(word(job, _LENGTHS) + request * 4, types.int32)), word(job, _PAGES) * word(job, _PAGE))


@njit(**NUMBA)
def _first_token(job: int, request: int) -> int:
    """Return a request's first visible token."""
    window = word(job, _WINDOW)
    return max(_length(job, request) - window, 0) if window > 0 else 0


@njit(**NUMBA)
def _splits(job: int, request: int) -> int:
    """Count a request's splits."""
    length, split = _length(job, request), word(job, _SPLIT)
    if length <= 0:
        return 0
    return (length + split - 1) // split - _first_token(job, request) // split


@njit(**NUMBA)
def token_row(job: int, request: int, token: int) -> int:
    """Return where a token's keys lie, in rows of all heads; a page id out of range reads some page."""
    page_size = word(job, _PAGE)
    entry = word(job, _TABLE) + (request * word(job, _PAGES) + token // page_size) * 4
    page = types.int64(load(entry, types.int32)) + types.int64(load(word(job, _FIRST), types.int32))
    return min(max(page, 0), word(job, _POOL) - 1) * page_size + token % page_size


@njit(**NUMBA)
def scale_of(job: int, scales: int, row: int, head: int) -> int:
    """Return where the scale of a token in this row (`token_row`) lies; those of the page's next tokens follow it."""
    page_size = word(job, _PAGE)
    page, offset = row // page_size, row % page_size
    return scales + ((page * word(job, _KV_HEADS) + head) * page_size + offset) * 4


def _query_blocks(level: Level, head_dim: int, keys: str, values: str) -> Callable[..., None]:
    """Make the attention of a key/value head's queries over a split: up to `_MOST_QUERIES` of them at a time."""
    vectors = head_dim // level.lanes
    most = max(1, min(_MOST_QUERIES, (level.registers * 2 // 3) // vectors))
    made = {
        n: (_dots(level, head_dim, keys, n), _weighted_sum(level, head_dim, values, n)) for n in range(1, most + 1)
    }  # fmt: skip
    kinds = [made[min(n, most)] for n in range(1, _MOST_QUERIES + 1)]
    dots, add_values = (_by_count(*functions) for functions in zip(*kinds, strict=True))
    soften, part, lanes = _softmax(level), (head_dim + 2) * 4, level.lanes
    scores_of_block = room(_MOST_QUERIES * MOST_TOKENS * 4)
    row, k_item, v_item = MOST_TOKENS * 4, ITEM[keys], ITEM[values]

    @njit(**NUMBA)
    def attend(job: int, request: int, head: int, begin: int, end: int, group: int, q: int, place: int) -> None:
        k_bytes, v_bytes = word(job, _KV_HEADS) * head_dim * k_item, word(job, _KV_HEADS) * head_dim * v_item
        k, v = word(job, _K) + head * head_dim * k_item, word(job, _V) + head * head_dim * v_item
        scores, page = scores_of_block(), word(job, _PAGE)
        done = 0
        while done < group:
            count = min(most, group - done)
            at_q, at = q + done * head_dim * 4, place + done * part
            token = begin
            while token < end:
                tokens = min(page - token % page, end - token)
                at_row = token_row(job, request, token)
                scales, to = scale_of(job, word(job, _K_SCALES), at_row, head), scores + (token - begin) * 4
                dots(count, at_q, k + at_row * k_bytes, k_bytes, tokens, to, v + at_row * v_bytes, v_bytes, scales)
                token += tokens
            for query in range(count):
                for extra in range(end - begin, (end - begin + lanes - 1) // lanes * lanes):
                    store(scores + query * row + extra * 4, float32(LOWEST))
                softened = at + query * part + head_dim * 4
                soften(scores + query * row, (end - begin + lanes - 1) // lanes, softened)
                for index in range(head_dim):
                    store(at + query * part + index * 4, float32(0))
            token = begin
            while token < end:
                tokens = min(page - token % page, end - token)
                at_row = token_row(job, request, token)
                scales, weights = scale_of(job, word(job, _V_SCALES), at_row, head), scores + (token - begin) * 4
                asked = k + at_row * k_bytes + head_dim * k_item
                add_values(count, weights, v + at_row * v_bytes, v_bytes, tokens, at, asked, k_bytes, scales)
                token += tokens
            done += count

    return attend


def _by_count(one: Any, two: Any, three: Any, four: Any) -> Callable[..., None]:
    """Make a function that calls the one of these that is made for so many queries."""

    @njit(**NUMBA)
    def run(
        count: int,
        source: int,
        rows: int,
        row_bytes: int,
        tokens: int,
        to: int,
        asked: int,
        asked_bytes: int,
        scales: int,
    ) -> None:
        if count == 1:
            one(source, rows, row_bytes, tokens, to, asked, asked_bytes, scales)
        elif count == 2:
            two(source, rows, row_bytes, tokens, to, asked, asked_bytes, scales)
        elif count == 3:
            three(source, rows, row_bytes, tokens, to, asked, asked_bytes, scales)
        else:
            four(source, rows, row_bytes, tokens, to, asked, asked_bytes, scales)

    made: Callable[..., None] = run
    return made


def _dots(level: Level, head_dim: int, kind: str, queries: int) -> Any:
    """Make the scores of a run of tokens: `queries` heads of q times each token's key."""

    @intrinsic
    def dots(
        typing: Any, q: Any, k: Any, k_row: Any, tokens: Any, scores: Any, asked: Any, asked_row: Any, scales: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, k, k_row, tokens, scores, asked, asked_row, scales = arguments
            write = Writer(builder, level.lanes)
            places = range(0, head_dim, level.lanes)
            heads = [
                [write.load(write.plus(q, (head * head_dim + at) * 4), write.vector, 4) for at in places]
                for head in range(queries)
            ]

            def step(index: Any, _: list[Any]) -> list[Any]:
                _ask_for(write, write.plus(asked, write.times(asked_row, index)), head_dim * ITEM[kind])
                keys = [
                    load_widened(write, write.plus(write.plus(k, write.times(k_row, index)), at * ITEM[kind]), kind)
                    for at in places
                ]
                scale = write.load(write.plus(scales, write.times(index, 4)), F32, 4) if has_scales(kind) else None
                for head, values in enumerate(heads):
                    total = builder.fmul(keys[0], values[0])
                    for key, value in zip(keys[1:], values[1:], strict=True):
                        total = write.fma(key, value, total)
                    place = write.plus(write.plus(scores, head * MOST_TOKENS * 4), write.times(index, 4))
                    score = write.sum(total)
                    write.store(score if scale is None else builder.fmul(score, scale), place)
                return []

            write.loop(tokens, [], step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), code

    return dots


def _weighted_sum(level: Level, head_dim: int, kind: str, queries: int) -> Any:
    """Add a run of tokens' values to the sums of `queries` heads, each token's by its weight."""
    part = (head_dim + 2) * 4

    @intrinsic
    def weighted_sum(
        typing: Any, weights: Any, v: Any, v_row: Any, tokens: Any, sums: Any, asked: Any, asked_row: Any, scales: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, v, v_row, tokens, sums, asked, asked_row, scales = arguments
            write = Writer(builder, level.lanes)
            vectors = range(0, head_dim, level.lanes)
            places = [write.plus(sums, head * part + at * 4) for head in range(queries) for at in vectors]

            def step(index: Any, totals: list[Any]) -> list[Any]:
                _ask_for(write, write.plus(asked, write.times(asked_row, index)), head_dim * ITEM[kind])
                values = [
                    load_widened(write, write.plus(write.plus(v, write.times(v_row, index)), at * ITEM[kind]), kind)
                    for at in vectors
                ]
                scale = write.load(write.plus(scales, write.times(index, 4)), F32, 4) if has_scales(kind) else None
                added = []
                for head in range(queries):
                    place = write.plus(write.plus(weights, head * MOST_TOKENS * 4), write.times(index, 4))
                    weight = write.load(place, F32, 4)
                    weight = write.splat(weight if scale is None else builder.fmul(weight, scale))
                    added += [
                        write.fma(weight, value, totals[head * len(values) + n]) for n, value in enumerate(values)
                    ]
                return added

            totals = write.loop(tokens, [write.load(place, write.vector, 4) for place in places], step)
            for place, total in zip(places, totals, strict=True):
                write.store(total, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), code

    return weighted_sum


def _softmax(level: Level) -> Any:
    """Turn vectors of scores into weights where they lie; leave the largest score and the sum of weights."""

    @intrinsic
    def soften(typing: Any, scores: Any, count: Any, to: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            scores, count, to = arguments
            write = Writer(builder, level.lanes)

            def at(index: Any) -> Any:
                return write.plus(scores, write.times(index, level.lanes * 4))

            def higher(index: Any, peaks: list[Any]) -> list[Any]:
                return [write.largest(write.load(at(index), write.vector, 4), peaks[0])]

            (peaks,) = write.loop(count, [write.constant(LOWEST)], higher)
            peak = write.peak(peaks)
            of_all = write.splat(peak)

            def weigh(index: Any, totals: list[Any]) -> list[Any]:
                weights = write.exp(builder.fsub(write.load(at(index), write.vector, 4), of_all))
                write.store(weights, at(index))
                return [builder.fadd(totals[0], weights)]

            (totals,) = write.loop(count, write.zeros(1), weigh)
            write.store(peak, to)
            write.store(write.sum(totals), write.plus(to, 4))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), code

    return soften


def _combinations(level: Level, head_dim: int) -> tuple[Any, Any]:
    """Make two functions: one adds a part to a part, one puts all parts of a head together."""

    @intrinsic
    def power(typing: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            write = Writer(builder, level.lanes)
            return builder.extract_element(write.exp(write.splat(arguments[0])), ir.Constant(ir.IntType(32), 0))

        return types.float32(types.float32), code

    @njit(**NUMBA)
    def fold(at: int, fresh: int) -> None:
        """Add the part at `fresh` to the one at `at`."""
        a, b = load(at + head_dim * 4, types.float32), load(fresh + head_dim * 4, types.float32)
        peak = max(a, b)
        before, after = power(a - peak), power(b - peak)
        store(at + head_dim * 4, peak)
        for index in range(head_dim + 2):
            if index != head_dim:
                old, new = load(at + index * 4, types.float32), load(fresh + index * 4, types.float32)
                store(at + index * 4, old * before + new * after)

    @njit(**NUMBA)
    def put_together(place: int, stride: int, count: int, sink: float, out: int) -> None:
        """Add up a head's parts in their order, the sink's weight first; zeros where there is none."""
        peak = max(sink, float32(LOWEST))
        for index in range(count):
            peak = max(peak, load(place + index * stride + head_dim * 4, types.float32))
        total = power(sink - peak)
        for index in range(head_dim):
            store(out + index * 4, float32(0))
        for split in range(count):
            at = place + split * stride
            weight = power(load(at + head_dim * 4, types.float32) - peak)
            total += weight * load(at + (head_dim + 1) * 4, types.float32)
            for index in range(head_dim):
                before = load(out + index * 4, types.float32)
                store(out + index * 4, before + weight * load(at + index * 4, types.float32))
        for index in range(head_dim):
            if count > 0:
                store(out + index * 4, load(out + index * 4, types.float32) / total)

    return fold, put_together


def _ask_for(write: Writer, token: Any, size: int) -> None:
    """Ask for a token's key or value, of one head, so that it comes while others are computed with."""
    for line in range(0, size, _LINE):
        write.prefetch(write.plus(token, line))


def load_widened(write: Writer, place: Any, kind: str) -> Any:
    """Load a vector of numbers of a kind, as float32."""
    if kind == "float32":
        return write.load(place, write.vector, 4)
    if kind == "bfloat16":
        return write.widen(write.load(place, ir.VectorType(I16, write.lanes), 2))
    numbers = write.load(place, ir.VectorType(I8, write.lanes), 1)
    return write.whole(numbers) if kind == "int8" else write.fp8(numbers)
