"""Vector code of products with quantised weights: values as integers, and the sums of their products with activations.

A register holds `lanes` outputs of a tile: a lane of 32 bits has a quad, four inputs' values of one output, or a sum.
A quad of a row of activations is broadcast to all lanes, so that no sum goes across lanes. `block_tiles.py` has the
layout of the weights; numbers of the layout stand here once more where code is made of them.

Integer sums are exact, in whatever order and by whatever instructions. Floating point sums are made by the same fused
multiply-adds in the same order for any number of rows, so a row's bits depend on the row alone; and with activations in
integers, on nothing about the CPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from ..block_tiles import BLOCK, OUTPUTS, QUAD, Layout
from .blocks_records import NUMBER_BYTES, PER_ROW, Activations, record_bytes
from .levels import Level
from .vectors import F32, I8, I16, I32, Writer

_MIDDLE = 128  # of unsigned bytes: what signed ones are less by
_FP8_IN_HALVES = 256.0  # what an e4m3 is times the float16 that has its exponent and its fraction
HIGH = 255  # what a high byte of a number of 16 bits is worth: odd, so that neither byte is ever -128
_QUADS = BLOCK // QUAD
# Values that may be summed in 16 bits before they are widened: 127 * (2 ** bits - 1) * 2 of each quad's pair.
_QUADS_IN_16_BITS = {4: 8, 5: 4, 6: 2, 8: 1}
_QUADS_OF_CODES = 4  # likewise of codes' numbers, which are up to 24
_CODE_PARTS = 2  # a code stands for a whole number of halves


class Form(NamedTuple):
    """What the code for a format's blocks depends on."""

    layout: Layout
    level: Level
    activations: Activations

    @property
    def is_float(self) -> bool:
        """Whether activations stay float32."""
        return self.activations == "float"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's numbers of a block."""
        return BLOCK * NUMBER_BYTES[self.activations]

    @property
    def groups(self) -> int:
        """Groups of inputs of a block; 1 where a group has several blocks."""
        return max(1, BLOCK // self.layout.group)

    @property
    def blocks(self) -> int:
        """Blocks of a group; 1 where a block has several groups."""
        return max(1, self.layout.group // BLOCK)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's values."""
        return 64 * self.layout.bits

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return {"uint8": 1, "float32": 4}.get(self.layout.scale_dtype, 2)

    @property
    def min_bytes(self) -> int:
        """Bytes of a min."""
        return 1 if self.layout.has_zeros else self.scale_bytes

    @property
    def table(self) -> list[int] | None:
        """The whole number, none below 0, that takes the place of each code; None: values are numbers."""
        codes = self.layout.codes
        return None if codes is None else [round(_CODE_PARTS * (code + max(codes))) for code in codes]

    @property
    def zero(self) -> int:
        """The whole number that stands for 0, or for the smallest value if there are mins."""
        codes = self.layout.codes
        return self.layout.zero if codes is None else round(_CODE_PARTS * max(codes))

    @property
    def quads_in_16_bits(self) -> int:
        """Quads whose products may be summed in 16 bits."""
        return _QUADS_IN_16_BITS[self.layout.bits] if self.layout.codes is None else _QUADS_OF_CODES

    @property
    def record_bytes(self) -> int:
        """Bytes of a record of activations."""
        return record_bytes(self.layout, self.activations)

    @property
    def is_plain(self) -> bool:
        """Whether the code is in LLVM's own terms, with no machine's instructions for bytes or float16."""
        return self.level.lanes == 4

    @property
    def is_signed(self) -> bool:
        """Whether values are made signed first: pairs of 8 bits would not fit the sums in 16 bits."""
        return self.layout.bits == 8 and not self.level.has_vnni


class Code(Writer):
    """Writes the code of one form."""

    def __init__(self, builder: Any, form: Form) -> None:
        super().__init__(builder, form.level.lanes)
        self.form, self.words = form, ir.VectorType(I32, form.level.lanes)

    def intrinsic(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Call one of LLVM's functions, which gives a value of a kind."""
        return self._intrinsic(name, kind, *arguments)

    def same(self, value: int) -> Any:
        """Return a vector of 32-bit words of one value."""
        return ir.Constant(self.words, [value] * self.lanes)

    def pick(self, vector: Any, order: Sequence[int]) -> Any:
        """Return a vector of some of a vector's elements."""
        kind = ir.VectorType(I32, len(order))
        return self.builder.shuffle_vector(vector, vector, ir.Constant(kind, list(order)))

    def bytes_of(self, words: Any) -> Any:
        """Look at words as bytes."""
        return self.builder.bitcast(words, ir.VectorType(I8, 4 * self.lanes))

    def words_of(self, vector: Any) -> Any:
        """Look at any vector of the register's size as words."""
        return self.builder.bitcast(vector, self.words)

    def scales(self, address: Any) -> Any:
        """Load scales, or mins that are numbers, as float32."""
        if self.form.scale_bytes == 4:
            return self.load(address, self.vector, 4)
        if self.form.scale_bytes == 1:
            return self._from_exponents(self.load(address, ir.VectorType(I8, self.lanes), 1))
        halves = self.load(address, ir.VectorType(I16, self.lanes), 2)
        return self.widen(halves) if self.form.layout.scale_dtype == "bfloat16" else self.from_halves(halves)

    def _from_exponents(self, exponents: Any) -> Any:
        """Make powers of two of exponents plus 127, over the parts that codes are counted in."""
        builder = self.builder
        words = builder.shl(builder.zext(exponents, self.words), self.same(23))
        is_least = builder.icmp_unsigned("==", words, self.same(0))  # 2 ** -127 has no exponent of its own
        power = builder.bitcast(builder.select(is_least, self.same(1 << 22), words), self.vector)
        return builder.fmul(power, self.constant(1 / _CODE_PARTS))

    def mins(self, address: Any, scale: Any) -> Any:
        """Load what is added to the products of values and their scale, as float32."""
        if not self.form.layout.has_zeros:
            return self.scales(address)
        builder = self.builder
        zeros = builder.zext(self.load(address, ir.VectorType(I8, self.lanes), 1), self.words)
        if self.form.is_signed and not self.form.is_float:
            zeros = builder.sub(zeros, self.same(_MIDDLE))
        return builder.fmul(builder.sitofp(builder.sub(self.same(0), zeros), self.vector), scale)

    def from_halves(self, halves: Any) -> Any:
        """Convert float16 to float32: where the machine that compiles may lack an instruction, by words' arithmetic."""
        builder = self.builder
        if not self.form.is_plain:
            return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), self.lanes)), self.vector)
        words = builder.zext(halves, self.words)
        size = builder.and_(words, self.same(0x7FFF))
        is_special = builder.icmp_unsigned(">=", size, self.same(0x7C00))
        exponent = builder.select(is_special, self.same(224 << 23), self.same(112 << 23))
        normal = builder.add(builder.shl(size, self.same(13)), exponent)
        small = builder.fmul(builder.sitofp(size, self.vector), ir.Constant(self.vector, [2.0**-24] * self.lanes))
        is_small = builder.icmp_unsigned("<", size, self.same(0x400))
        sign = builder.shl(builder.and_(words, self.same(0x8000)), self.same(16))
        value = builder.select(is_small, self.words_of(small), normal)
        return builder.bitcast(builder.or_(value, sign), self.vector)

    def broadcast(self, address: Any, kind: Any) -> Any:
        """Load a number and fill a vector with it."""
        return self.splat(self.load(address, kind, 4))


class Values:
    """The values of a block, for `lanes` outputs of a tile: loaded where a quad is asked for."""

    def __init__(self, code: Code, address: Any, part: Any) -> None:
        self._code, self._loaded = code, {}  # type: Code, dict[int, Any]
        bits = code.form.layout.bits
        self._low = code.plus(address, code.times(part, QUAD * code.lanes))
        step = code.lanes // 2 if bits == 5 else QUAD * code.lanes
        self._high = code.plus(code.plus(address, 256), code.times(part, step))

    def quad(self, quad: int) -> Any:
        """Return a quad's values as unsigned bytes, four in a word."""
        code, bits = self._code, self._code.form.layout.bits
        if bits == 8:
            return code.load(code.plus(self._low, 64 * quad), code.words, 1)
        builder = code.builder
        if quad % 4 not in self._loaded:
            self._loaded[quad % 4] = code.load(code.plus(self._low, 64 * (quad % 4)), code.words, 1)
        both = self._loaded[quad % 4]
        low = builder.and_(builder.lshr(both, code.same(4)) if quad >= 4 else both, code.same(0x0F0F0F0F))
        if code.form.table is not None:
            return self._numbers_of(low, code.form.table)
        if bits == 5:
            return self._with_fifth_bit(low, quad)
        return builder.or_(low, self._upper_two_bits(quad)) if bits == 6 else low

    def _numbers_of(self, codes: Any, table: list[int]) -> Any:
        """Put a table's numbers in the place of codes of four bits."""
        code = self._code
        kind = ir.VectorType(I8, QUAD * code.lanes)
        if not code.form.is_plain:  # vpshufb
            name = {8: "avx2.pshuf.b", 16: "avx512.pshuf.b.512"}[code.lanes]
            repeated = ir.Constant(kind, table * (kind.count // len(table)))
            return code.words_of(code.intrinsic(f"llvm.x86.{name}", kind, repeated, code.bytes_of(codes)))
        found, asked = ir.Constant(kind, [table[0]] * kind.count), code.bytes_of(codes)
        for index, number in enumerate(table):
            is_it = code.builder.icmp_unsigned("==", asked, ir.Constant(kind, [index] * kind.count))
            found = code.builder.select(is_it, ir.Constant(kind, [number] * kind.count), found)
        return code.words_of(found)

    def _with_fifth_bit(self, low: Any, quad: int) -> Any:
        code, builder = self._code, self._code.builder
        count = QUAD * code.lanes
        packed = code.load(code.plus(self._high, 8 * quad), ir.IntType(count), 1)
        is_set = builder.bitcast(packed, ir.VectorType(ir.IntType(1), count))
        values = code.bytes_of(low)
        raised = builder.add(values, ir.Constant(values.type, [16] * count))
        return code.words_of(builder.select(is_set, raised, values))

    def _upper_two_bits(self, quad: int) -> Any:
        code, builder = self._code, self._code.builder
        packed = code.load(code.plus(self._high, 64 * (quad // 4)), code.words, 1)
        shift = 4 - 2 * (quad % 4)  # to bits 4 and 5 of each byte, so that no other byte's are left there
        if shift > 0:
            packed = builder.shl(packed, code.same(shift))
        elif shift < 0:
            packed = builder.lshr(packed, code.same(-shift))
        return builder.and_(packed, code.same(0x30303030))


def integer_sums(
    code: Code, values: Values, quads: Sequence[int], rows: Sequence[Any], starts: Sequence[Any]
) -> list[Any]:
    """Add the products of quads with rows of activations of 8 bits.

    Args:
        code: where to write.
        values: of the block.
        quads: which of its quads.
        rows: the address of each row's activations of the block.
        starts: a vector for each row, which the sums begin with.
    """
    form = code.form
    dot = _dot_by_vnni if form.level.has_vnni else _dot_by_widening if form.is_plain else _dot_by_pairs
    sums = list(starts)
    at_once = 1 if form.level.has_vnni else code.form.quads_in_16_bits
    for begin in range(0, len(quads), at_once):
        some = quads[begin : begin + at_once]
        weights = [_operand(code, values.quad(quad)) for quad in some]
        for row, place in enumerate(rows):
            x = [code.broadcast(code.plus(place, QUAD * quad), I32) for quad in some]
            sums[row] = dot(code, sums[row], weights, x)
    return sums


def _operand(code: Code, quad: Any) -> Any:
    return code.builder.xor(quad, code.same(-0x7F7F7F80)) if code.form.is_signed else quad  # 0x80 in each byte


def _dot_by_vnni(code: Code, total: Any, weights: Sequence[Any], x: Sequence[Any]) -> Any:
    """Add the products of unsigned and signed bytes, four to a word (vpdpbusd)."""
    for w, values in zip(weights, x, strict=True):
        total = code.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * code.lanes}", code.words, total, w, values)
    return total


def _dot_by_pairs(code: Code, total: Any, weights: Sequence[Any], x: Sequence[Any]) -> Any:
    """The same by sums of pairs in 16 bits (vpmaddubsw), which must not overflow, and then in 32 bits."""
    name = {8: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd"), 16: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512")}[code.lanes]
    halves = ir.VectorType(I16, 2 * code.lanes)
    pairs = None
    for w, values in zip(weights, x, strict=True):
        if code.form.is_signed:
            w, values = _with_sign_moved(code, w, values)
        both = code.intrinsic(f"llvm.x86.{name[0]}", halves, code.bytes_of(w), code.bytes_of(values))
        pairs = both if pairs is None else code.builder.add(pairs, both)
    ones = ir.Constant(halves, [1] * halves.count)
    return code.builder.add(total, code.intrinsic(f"llvm.x86.{name[1]}", code.words, pairs, ones))


def _with_sign_moved(code: Code, w: Any, x: Any) -> tuple[Any, Any]:
    """Return |w| and x * sign(w), as words."""
    builder = code.builder
    w, x = code.bytes_of(w), code.bytes_of(x)
    zeros = ir.Constant(w.type, None)
    is_negative = builder.icmp_signed("<", w, zeros)
    size = builder.select(is_negative, builder.sub(zeros, w), w)
    mask = builder.sext(is_negative, w.type)
    return code.words_of(size), code.words_of(builder.sub(builder.xor(x, mask), mask))


def _dot_by_widening(code: Code, total: Any, weights: Sequence[Any], x: Sequence[Any]) -> Any:
    """The same in LLVM's own terms, for which NEON has instructions: sums of pairs in 32 bits, twice."""
    builder = code.builder
    for w, values in zip(weights, x, strict=True):
        wide = ir.VectorType(I16, QUAD * code.lanes)
        products = builder.mul(*(builder.sext(code.bytes_of(operand), wide) for operand in (w, values)))
        sums = builder.sext(products, ir.VectorType(I32, QUAD * code.lanes))
        for count in (2 * code.lanes, code.lanes):
            even, odd = (list(range(first, 2 * count, 2)) for first in (0, 1))
            sums = builder.add(*(code.pick(sums, order) for order in (even, odd)))
        total = builder.add(total, sums)
    return total


def block_of_integers(
    code: Code, values: Values, scales: Any, mins: Any, x: Any, of_rows: Any, totals: list[Any]
) -> list[Any]:
    """Add a block's products to the totals of some rows.

    Args:
        code: where to write.
        values: of the block.
        scales: the address of its scales of these outputs.
        mins: the address of its mins; of no use if there are none.
        x: the address of the first row's activations in the record of the block.
        of_rows: the address of the first row's scale there.
        totals: a vector for each row.
    """
    form, builder = code.form, code.builder
    rows = [code.plus(x, form.row_bytes * row) for row in range(len(totals))]
    for group in range(form.groups):
        every = _QUADS // form.groups
        # Quads of one byte's halves one after the other.
        quads = range(every * group, every * (group + 1)) if form.groups > 1 else (0, 4, 1, 5, 2, 6, 3, 7)
        own = [code.plus(of_rows, PER_ROW * (1 + group) + 4 * row) for row in range(len(totals))]
        has_zero = form.zero != 0 and not form.is_signed
        starts = [code.broadcast(place, I32) if has_zero else code.same(0) for place in own]
        if form.activations == "int16":
            starts = _times_high(code, integer_sums(code, values, quads, rows, [code.same(0)] * len(rows)), starts)
            sums = integer_sums(code, values, quads, [code.plus(row, BLOCK) for row in rows], starts)
        else:
            sums = integer_sums(code, values, quads, rows, starts)
        scale = code.scales(code.plus(scales, group * OUTPUTS * form.scale_bytes))
        least = code.mins(code.plus(mins, group * OUTPUTS * form.min_bytes), scale) if form.layout.has_mins else None
        for row, total in enumerate(sums):
            both = builder.fmul(scale, code.broadcast(code.plus(of_rows, 4 * row), F32))
            totals[row] = code.fma(builder.sitofp(total, code.vector), both, totals[row])
            if least is not None:
                totals[row] = code.fma(least, code.broadcast(own[row], F32), totals[row])
    return totals


def _times_high(code: Code, sums: Sequence[Any], starts: Sequence[Any]) -> list[Any]:
    """Return what sums over the high bytes of activations add to sums over the low ones."""
    builder, by = code.builder, code.same(HIGH)
    return [builder.add(start, builder.mul(total, by)) for total, start in zip(sums, starts, strict=True)]


def block_of_floats(
    code: Code, values: Values, scales: Any, mins: Any, x: Any, of_rows: Any, totals: list[Any]
) -> list[Any]:
    """Do the same with activations in float32. Even and odd inputs are two sums of a block, added at its end."""
    form, builder = code.form, code.builder
    zeros = code.zeros(1)[0]
    sums = [[zeros, zeros] for _ in totals]
    for quad in range(_QUADS):
        if quad % (_QUADS // form.groups) == 0:
            at = quad * form.groups // _QUADS * OUTPUTS
            scale = code.scales(code.plus(scales, at * form.scale_bytes))
            least = code.mins(code.plus(mins, at * form.min_bytes), scale) if form.layout.has_mins else zeros
            if form.layout.float_dtype is not None:
                scale = builder.fmul(scale, ir.Constant(code.vector, [_FP8_IN_HALVES] * code.lanes))
            zero = ir.Constant(code.vector, [-float(form.zero)] * code.lanes)
            start = code.fma(scale, zero, least) if form.zero else least
        word = values.quad(quad)
        for index in range(QUAD):
            value = builder.and_(builder.lshr(word, code.same(8 * index)), code.same(0xFF))
            number = builder.sitofp(value, code.vector) if form.layout.float_dtype is None else _from_fp8(code, value)
            w = code.fma(number, scale, start)
            for row in range(len(totals)):
                place = code.plus(x, 4 * (BLOCK * row + QUAD * quad + index))
                sums[row][index % 2] = code.fma(code.broadcast(place, F32), w, sums[row][index % 2])
    return [builder.fadd(total, builder.fadd(*both)) for total, both in zip(totals, sums, strict=True)]


def _from_fp8(code: Code, value: Any) -> Any:
    """Convert words that hold an e4m3 each to float32, less by `_FP8_IN_HALVES`. NaN becomes a number: none is kept."""
    builder = code.builder
    size = builder.shl(builder.and_(value, code.same(0x7F)), code.same(7))
    sign = builder.shl(builder.and_(value, code.same(0x80)), code.same(8))
    return code.from_halves(builder.trunc(builder.or_(size, sign), ir.VectorType(I16, code.lanes)))
