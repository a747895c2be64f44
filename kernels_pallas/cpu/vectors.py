"""Loops over vectors of float32, written in LLVM's intermediate form by intrinsics of numba.

LLVM's own vectoriser would not keep a tile of sums in registers; here it is said which values are vectors, and LLVM
chooses instructions and registers. Addresses are int64 values. A sum is always made by fused multiply-adds in the order
that the caller writes, so it has the same bits wherever the row stands in a tile.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I64, I32, I16, I8, F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.FloatType()

# Of exp: ln 2 in two parts, the first with few bits, and the coefficients of the polynomial, highest power first.
_LOG2_E, _ROUND, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 12582912.0, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


class Writer:
    """Writes vector code for registers of `lanes` float32 values at a builder's position."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.vector = ir.VectorType(F32, lanes)

    def number(self, value: int) -> Any:
        """Return an int64 constant."""
        return ir.Constant(I64, value)

    def zeros(self, count: int) -> list[Any]:
        """Return vectors of zeros."""
        return [ir.Constant(self.vector, None)] * count

    def plus(self, address: Any, offset: Any) -> Any:
        """Return an address further on; the offset, in bytes, is a number or a value."""
        return self.builder.add(address, self.number(offset) if isinstance(offset, int) else offset)

    def times(self, value: Any, factor: Any) -> Any:
        """Return an int64 product; the factor is a number or a value."""
        return self.builder.mul(value, self.number(factor) if isinstance(factor, int) else factor)

    def load(self, address: Any, kind: Any, align: int) -> Any:
        """Load a value of an LLVM type."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 4) -> None:
        """Store a value."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def floats(self, address: Any) -> Any:
        """Load a vector of float32."""
        return self.load(address, self.vector, 4)

    def splat(self, scalar: Any, lanes: int | None = None) -> Any:
        """Fill a vector with a scalar."""
        lanes = lanes or self.lanes
        kind = ir.VectorType(scalar.type, lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, rounded once."""
        return self._intrinsic(f"llvm.fma.v{self.lanes}f32", self.vector, a, b, c)

    def pairs(self, low: Any, high: Any, start: int) -> Any:
        """Interleave `lanes` elements, from `start` on, of two vectors of 16-bit values, those of `low` first."""
        size = low.type.count
        order = [index for k in range(start, start + self.lanes) for index in (k, size + k)]
        return self.builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(order)), order))

    def first(self, count: Any, size: int) -> Any:
        """Return a mask of `size` elements of which the first `count` are set; a number or a value."""
        kind = ir.VectorType(I64, size)
        return self.builder.icmp_signed("<", ir.Constant(kind, list(range(size))), self.splat(count, size))

    def load_masked(self, address: Any, kind: Any, align: int, mask: Any) -> Any:
        """Load the elements of a vector that the mask has, and zeros; the others are not read."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        name = f"llvm.masked.load.v{kind.count}{kind.element.intrinsic_name}.p0"
        return self._intrinsic(name, kind, pointer, ir.Constant(I32, align), mask, ir.Constant(kind, None))

    def store_masked(self, value: Any, address: Any, mask: Any) -> None:
        """Store the elements of a vector of float32 that the mask has."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        self._intrinsic(name, ir.VoidType(), value, pointer, ir.Constant(I32, 4), mask)

    def widen(self, words: Any) -> Any:
        """Convert a vector of bfloat16, as 16-bit words, to float32."""
        wide = self.builder.zext(words, ir.VectorType(I32, words.type.count))
        shifted = self.builder.shl(wide, ir.Constant(wide.type, [16] * words.type.count))
        return self.builder.bitcast(shifted, ir.VectorType(F32, words.type.count))

    def whole(self, numbers: Any) -> Any:
        """Convert a vector of int8 to float32."""
        wide = self.builder.sext(numbers, ir.VectorType(I32, numbers.type.count))
        return self.builder.sitofp(wide, ir.VectorType(F32, numbers.type.count))

    def fp8(self, numbers: Any) -> Any:
        """Convert a vector of float8_e4m3fn, as 8-bit words, to float32; NaN, which is all ones, to 480 or -480.

        Below the smallest normal number they are whole numbers of 2 ** -9, which do not depend on how a thread treats
        denormal numbers.
        """
        builder, count = self.builder, numbers.type.count
        words, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)

        def every(value: int) -> Any:
            return ir.Constant(words, [value] * count)

        wide = builder.zext(numbers, words)
        magnitude = builder.and_(wide, every(0x7F))
        # The exponent's bias is 7 here and 127 there.
        normal = builder.bitcast(builder.add(builder.shl(magnitude, every(20)), every(120 << 23)), floats)
        unit = ir.Constant(floats, [ir.Constant(F32, 2.0**-9)] * count)
        small = builder.fmul(builder.sitofp(magnitude, floats), unit)
        found = builder.select(builder.icmp_unsigned("<", magnitude, every(8)), small, normal)
        sign = builder.shl(builder.and_(wide, every(0x80)), every(24))
        return builder.bitcast(builder.or_(builder.bitcast(found, words), sign), floats)

    def part(self, vector: Any, start: int, count: int) -> Any:
        """Return `count` elements of a vector."""
        order = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
        return self.builder.shuffle_vector(vector, vector, order)

    def dot_pairs(self, total: Any, a: Any, b: Any) -> Any:
        """Add the products of bfloat16 pairs, 16-bit vectors of twice the lanes, to a vector (vdpbf16ps)."""
        kind = ir.VectorType(_BFloat16(), 2 * self.lanes)
        a, b = (self.builder.bitcast(x, kind) for x in (a, b))
        return self._intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.vector, total, a, b)

    def sum(self, vector: Any) -> Any:
        """Add a vector's elements, halves first: always in the same order."""
        count = vector.type.count
        while count > 1:
            count //= 2
            vector = self.builder.fadd(self.part(vector, 0, count), self.part(vector, count, count))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def largest(self, a: Any, b: Any) -> Any:
        """Return the larger of two values, element by element; of a NaN and a number either."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def peak(self, vector: Any) -> Any:
        """Return a vector's largest element."""
        count = vector.type.count
        while count > 1:
            count //= 2
            vector = self.largest(self.part(vector, 0, count), self.part(vector, count, count))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def constant(self, value: float) -> Any:
        """Return a vector full of a constant."""
        return ir.Constant(self.vector, [ir.Constant(F32, value)] * self.lanes)

    def exp(self, x: Any) -> Any:
        """Compute e ** x for x of at most 0, to about one unit in the last place; below -87 it is e ** -87.

        x = n ln 2 + r, and a polynomial in r (Cephes, expf). NaN stays NaN.
        """
        builder, words = self.builder, ir.VectorType(I32, self.lanes)
        x = builder.select(builder.fcmp_ordered("<", x, self.constant(-87.0)), self.constant(-87.0), x)
        # Added to 1.5 * 2 ** 23, a float32 is rounded to a whole number, which its last bits then hold.
        shifted = self.fma(x, self.constant(_LOG2_E), self.constant(_ROUND))
        n = builder.fsub(shifted, self.constant(_ROUND))
        r = self.fma(n, self.constant(-_LN2_HIGH), x)
        r = self.fma(n, self.constant(-_LN2_LOW), r)
        total = self.constant(_EXP[0])
        for coefficient in _EXP[1:]:
            total = self.fma(total, r, self.constant(coefficient))
        total = builder.fadd(self.fma(total, builder.fmul(r, r), r), self.constant(1.0))
        exponent = builder.add(builder.bitcast(shifted, words), ir.Constant(words, [127] * self.lanes))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(words, [23] * self.lanes)), self.vector)
        return builder.fmul(total, power)

    def prefetch(self, address: Any, locality: int = 3) -> None:
        """Ask for the cache line at an address, which need not be readable."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        known = self.builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        self.builder.call(known, [pointer, *(ir.Constant(I32, x) for x in (0, locality, 1))])

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any]:
        """Repeat `count` times; `body` gets the index and the carried values, and returns the next ones."""
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index, values = builder.phi(I64), [builder.phi(value.type) for value in carried]
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        changed = body(index, values)
        following = builder.add(index, self.number(1))
        builder.branch(head)
        for phi, first, then in zip([index, *values], [self.number(0), *carried], [following, *changed], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, builder.block)
        builder.position_at_end(after)
        return values

    def _intrinsic(self, name: str, kind: Any, *arguments: Any) -> Any:
        signature = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.builder.call(self.builder.module.declare_intrinsic(name, (), signature), arguments)
