"""What each opcode does. `bind` makes a statement a closure over a launch's registers.

A closure takes a mask and writes only where it holds. Rounding is to nearest as on a GPU, also of
`fma`; what a GPU approximates (ex2, lg2, rcp, div.full) is correctly rounded here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import exchange
from ptx.machine import TYPES, Blocks, Step
from ptx.parser import Name, Register, Statement, Vector

HALVES = ("bf16", "f16")
FLUSHED = np.float32(2.0**-126)  # below it numbers are 0 under .ftz
Function = Callable[..., Any]


def bind(m: Blocks, s: Statement) -> Step:
    kind = s.parts[0]
    make = TABLE.get(kind) or exchange.TABLE.get(kind)
    if make is None:
        raise NotImplementedError(f"{s.text}: no such operation in tests/ptx")
    step = make(m, s)
    if s.guard is None:
        return step
    guard = s.guard

    def guarded(mask: Any) -> None:
        here = m.predicate(guard) & mask
        if here.any():
            step(here)

    return guarded


# ---- operands of arithmetic


def to_float(bits: Any, kind: str) -> Any:
    """Numbers of 16 bits as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bits(x: Any, kind: str, towards_zero: bool = False) -> Any:
    """float32 or float64 to 16 bits, rounded once: to nearest even, or (.rz) cut off."""
    if kind == "f16":
        with_nearest = x.astype(np.float16)
        if towards_zero:
            past = np.abs(with_nearest.astype(x.dtype)) > np.abs(x)
            with_nearest = np.where(past, np.nextafter(with_nearest, np.float16(0)), with_nearest)
        return with_nearest.view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    half = np.uint32(0) if towards_zero else np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return np.where(np.isnan(x), 0x7FFF, (bits + half) >> np.uint32(16)).astype(np.uint16)


def flush(x: Any) -> Any:
    return np.where(np.abs(x) < FLUSHED, x * np.float32(0), x)


def reader(m: Blocks, operand: Any, kind: str) -> Callable[[], Any]:
    """A function that reads an operand of a type, as float32 where it has 16 bits."""
    if kind in HALVES:
        bits = m.value(operand, TYPES["b16"])
        return lambda: to_float(bits, kind)
    if kind == "f32x2":
        pair = m.value(operand, TYPES["b64"])
        return lambda: pair.view(np.float32).reshape(-1, 2)
    if kind.removesuffix("x2") in HALVES:
        two = np.atleast_1d(m.value(operand, TYPES["b32"]))
        return lambda: to_float(two.view(np.uint16).reshape(-1, 2), kind[:-2])
    fixed = m.value(operand, TYPES[kind])
    return lambda: fixed


def writer(m: Blocks, operand: Any, kind: str) -> Callable[[Any, Any], None]:
    """A function (value, mask) that writes an operand of a type."""
    if isinstance(operand, Name) and operand == "_":
        return lambda value, mask: None
    if kind in HALVES:
        bits = m.value(operand, TYPES["b16"])
        return lambda value, mask: np.copyto(bits, to_bits(value, kind), where=mask)
    if kind == "f32x2":
        pair = m.register(operand, TYPES["b64"]).view(np.float32).reshape(-1, 2)
        return lambda value, mask: np.copyto(
            pair, value, where=mask if mask is True else mask[:, None]
        )
    out = m.register(operand, TYPES[kind])
    return lambda value, mask: np.copyto(out, value, where=mask, casting="unsafe")


def function_of(function: Function, count: int) -> Any:
    """An operation that reads `count` operands in the type of the opcode's end, and writes that."""

    def make(m: Blocks, s: Statement) -> Step:
        kind = s.parts[-1]
        if len(s.operands) != count + 1:
            raise NotImplementedError(f"{s.text}: {len(s.operands) - 1} operands in tests/ptx")
        mixed = kind in HALVES and "f32" in s.parts  # sub.rn.f32.bf16: only the first is narrow
        kinds = [kind, "f32", "f32"] if mixed else [kind] * 3
        if isinstance(function, np.ufunc) and "ftz" not in s.parts and kind in TYPES:
            values = [m.value(x, TYPES[kind]) for x in s.operands[1:]]
            out = m.register(s.operands[0], TYPES[kind])
            return lambda mask: function(*values, out=out, where=mask)
        read = [reader(m, x, k) for x, k in zip(s.operands[1:], kinds, strict=False)]
        write = writer(m, s.operands[0], "f32" if mixed else kind)
        if "ftz" in s.parts:
            return lambda mask: write(flush(function(*(flush(x()) for x in read))), mask)
        return lambda mask: write(function(*(x() for x in read)), mask)

    return make


# ---- arithmetic


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    if a.dtype == np.float64:
        wide = [x.astype(np.longdouble) for x in (a, b, c)]
        return (wide[0] * wide[1] + wide[2]).astype(np.float64)
    # the product is exact in float64; the sum is rounded to odd, so that the next rounding is right
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = np.array(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def divide(a: Any, b: Any) -> Any:
    """Integers are divided towards 0."""
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    return ((a - np.fmod(a, safe)) // safe).astype(a.dtype)


def shifted(function: Function) -> Any:
    """A shift by at least the width leaves nothing, or the sign."""

    def make(m: Blocks, s: Statement) -> Step:
        dtype = TYPES[s.parts[-1]]
        a, by = m.value(s.operands[1], dtype), m.value(s.operands[2], TYPES["u32"])
        write, width = writer(m, s.operands[0], s.parts[-1]), 8 * dtype.itemsize

        def step(mask: Any) -> None:
            out = function(a, np.minimum(by, width - 1).astype(dtype))
            rest = function(out, dtype.type(1)) if dtype.kind == "i" else dtype.type(0)
            write(np.where(by >= width, rest, out), mask)

        return step

    return make


def multiply(m: Blocks, s: Statement) -> Step:
    """mul, mad: rounded floats; the low, high or whole (.wide) product of integers."""
    kind, adds = s.parts[-1], s.parts[0] == "mad"
    if not {"lo", "hi", "wide"} & set(s.parts):
        return function_of(np.multiply, 2)(m, s)  # type: ignore[no-any-return]
    wide = f"{kind[0]}{2 * int(kind[1:])}" if "wide" in s.parts else kind
    a, b = (m.value(x, TYPES[kind]) for x in s.operands[1:3])
    c = m.value(s.operands[3], TYPES[wide]) if adds else TYPES[wide].type(0)
    write, width = writer(m, s.operands[0], wide), int(kind[1:])

    def step(mask: Any) -> None:
        if "wide" in s.parts:
            product = a.astype(TYPES[wide]) * b.astype(TYPES[wide])
        elif "lo" in s.parts:
            product = a * b
        elif width == 32:
            product = (a.astype(np.int64 if kind[0] == "s" else np.uint64) * b) >> width
        else:
            exact = [int(x) * int(y) >> width for x, y in np.broadcast(a, b)]
            product = np.array([x & ((1 << 64) - 1) for x in exact], np.uint64)
        write(product.astype(TYPES[wide]) + c, mask)

    return step


def extreme(plain: Function, keeps_nan: Function) -> Any:
    def make(m: Blocks, s: Statement) -> Step:
        two, count = keeps_nan if "NaN" in s.parts else plain, len(s.operands) - 1
        of_three = lambda a, b, c: two(two(a, b), c)  # noqa: E731  # from sm_100 on
        return function_of(two if count == 2 else of_three, count)(m, s)  # type: ignore[no-any-return]

    return make


def field_of_bits(m: Blocks, s: Statement) -> Step:
    """bfe: a field of bits."""
    kind = s.parts[-1]
    read = [reader(m, s.operands[1], kind), *(reader(m, x, "u32") for x in s.operands[2:])]
    write, width = writer(m, s.operands[0], kind), int(kind[1:])

    def step(mask: Any) -> None:
        a, at, n = (x().astype(np.int64) for x in read)
        found = (a >> at) & ((1 << n) - 1)
        if kind[0] == "s":
            negative = (n > 0) & (found >> np.maximum(n - 1, 0) & 1 == 1)
            found = np.where(negative, found - (1 << n), found)
        write(np.where(at >= width, 0, found), mask)

    return step


def permute(m: Blocks, s: Statement) -> Step:
    """prmt: four bytes of eight."""
    a, b, c = (m.value(x, TYPES["u32"]) for x in s.operands[1:4])
    write = writer(m, s.operands[0], "u32")

    def step(mask: Any) -> None:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        out = np.uint64(0)
        for i in range(4):
            pick = (c >> np.uint32(4 * i)).astype(np.uint64)
            byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            out = out | (np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i))
        write(out, mask)

    return step


# ---- moves, comparisons, conversions


def move(m: Blocks, s: Statement) -> Step:
    to, of = s.operands
    width = int(s.parts[-1][1:]) if s.parts[-1] != "pred" else 1
    if isinstance(to, Vector) or isinstance(of, Vector):
        many = to if isinstance(to, Vector) else of
        part = f"b{width // len(many)}"
        if isinstance(to, Vector):
            source = m.register(of, TYPES[f"b{width}"]).view(TYPES[part]).reshape(-1, len(many))
            out = [writer(m, x, part) for x in to]
            return lambda mask: [w(source[:, i], mask) for i, w in enumerate(out)] and None
        target = m.register(to, TYPES[f"b{width}"]).view(TYPES[part]).reshape(-1, len(many))
        values = [m.value(x, TYPES[part]) for x in of]
        return lambda mask: (
            [np.copyto(target[:, i], v, where=mask) for i, v in enumerate(values)] and None
        )
    return _copy(m, s)


def _copy(m: Blocks, s: Statement) -> Step:
    dtype = TYPES[s.parts[-1]]
    value, out = m.value(s.operands[1], dtype), m.register(s.operands[0], dtype)
    return lambda mask: np.copyto(out, value, where=mask)


COMPARE: dict[str, Function] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal},
    **{"hi": np.greater, "hs": np.greater_equal},
}
JOIN: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(m: Blocks, s: Statement) -> Step:
    """setp.CMP[.and|.or|.xor].TYPE p[|q], a, b[, c]. A u in front of floats' CMP: NaN counts.

    q is the contrary, or of a pair the upper number's.
    """
    kind, how = s.parts[-1], s.parts[1]
    pair = kind.endswith("x2")
    a, b = (reader(m, x, kind) for x in s.operands[1:3])
    join = next((JOIN[x] for x in s.parts if x in JOIN), None)
    other = m.value(s.operands[3], TYPES["pred"]) if join else None
    to = s.operands[0] if isinstance(s.operands[0], Vector) else (s.operands[0],)
    out = [writer(m, x, "pred") for x in to]
    floats = pair or kind in HALVES or TYPES[kind].kind == "f"

    def step(mask: Any) -> None:
        x, y = a(), b()
        nan = np.isnan(x) | np.isnan(y) if floats else np.False_
        if how in ("nan", "num"):
            found = nan if how == "nan" else ~nan
        else:
            unordered = floats and how.endswith("u")
            found = COMPARE[how[:2]](x, y)
            found = found | nan if unordered else found & ~nan
        for i, write in enumerate(out):
            value = found[:, i] if pair else ~found if i else found
            write(value if join is None else join(value, other), mask)

    return step


def select(m: Blocks, s: Statement) -> Step:
    kind = s.parts[-1]
    a, b = (m.value(x, TYPES[kind]) for x in s.operands[1:3])
    which, write = m.value(s.operands[3], TYPES["pred"]), writer(m, s.operands[0], kind)
    return lambda mask: write(np.where(which, a, b), mask)


def convert(m: Blocks, s: Statement) -> Step:
    kinds = [x for x in s.parts if x in TYPES or x in HALVES or x.endswith("x2")]
    to, of = kinds
    cut = "rz" in s.parts
    if to.endswith("x2"):  # two numbers, the first into the upper half
        upper, lower = (reader(m, x, of) for x in s.operands[1:3])
        out = m.register(s.operands[0], TYPES["b32"])

        def pack(mask: Any) -> None:
            high, low = (to_bits(x(), to[:-2], cut).astype(np.uint32) for x in (upper, lower))
            np.copyto(out, low | (high << np.uint32(16)), where=mask)

        return pack
    read = sized(m, s.operands[1], of)
    if to in HALVES:
        bits = m.register(s.operands[0], TYPES["b16"])
        return lambda mask: np.copyto(bits, to_bits(read(), to, cut), where=mask)
    whole = next((ROUNDED[x] for x in s.parts if x in ROUNDED), None)
    write = sized_writer(m, s.operands[0], to)
    if whole is None:
        return lambda mask: write(read().astype(TYPES[to]), mask)
    if TYPES[to].kind == "f":
        return lambda mask: write(whole(read()), mask)
    return lambda mask: write(saturated(whole(read()), TYPES[to]), mask)


def saturated(x: Any, dtype: Any) -> Any:
    """Whole numbers as integers of a type; what it does not hold becomes its nearest, NaN 0."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = np.where((x >= float(least)) & (x < float(most)), x, 0).astype(dtype)
    return np.where(
        x >= float(most), dtype.type(most), np.where(x < least, dtype.type(least), inside)
    )


ROUNDED: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def sized(m: Blocks, operand: Any, kind: str) -> Callable[[], Any]:
    """As `reader`, also where the register is wider than the type: its low bits."""
    if kind in HALVES or not isinstance(operand, Register):
        return reader(m, operand, kind)
    bits = m.files[operand.file][operand.index]
    if bits.dtype.itemsize == TYPES[kind].itemsize:
        return reader(m, operand, kind)
    return lambda: bits.astype(f"u{TYPES[kind].itemsize}").view(TYPES[kind])


def sized_writer(m: Blocks, operand: Any, kind: str) -> Callable[[Any, Any], None]:
    """As `writer`, also into a wider register: with the sign where the type has one."""
    bits = m.files[operand.file][operand.index]
    if bits.dtype.itemsize == TYPES[kind].itemsize:
        return writer(m, operand, kind)
    signed = bits.view(bits.dtype.str.replace("u", "i")) if TYPES[kind].kind == "i" else bits
    return lambda value, mask: np.copyto(signed, value, where=mask)


# ---- the table

TABLE: dict[str, Callable[[Blocks, Statement], Step]] = {
    "mov": move,
    "cvt": convert,
    "setp": compare,
    "selp": select,
    "add": function_of(np.add, 2),
    "sub": function_of(np.subtract, 2),
    "mul": multiply,
    "mad": multiply,
    "fma": function_of(fused, 3),
    "div": function_of(divide, 2),
    "rem": function_of(lambda a, b: np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype)), 2),
    "neg": function_of(np.negative, 1),
    "abs": function_of(np.abs, 1),
    "min": extreme(np.fmin, np.minimum),
    "max": extreme(np.fmax, np.maximum),
    "and": function_of(np.bitwise_and, 2),
    "or": function_of(np.bitwise_or, 2),
    "xor": function_of(np.bitwise_xor, 2),
    "not": function_of(np.invert, 1),
    "popc": function_of(lambda x: sum(x >> np.uint32(bit) & np.uint32(1) for bit in range(32)), 1),
    "shl": shifted(np.left_shift),
    "shr": shifted(np.right_shift),
    "bfe": field_of_bits,
    "prmt": permute,
    "ex2": function_of(lambda x: np.exp2(x.astype(np.float64)).astype(np.float32), 1),
    "lg2": function_of(lambda x: np.log2(x.astype(np.float64)).astype(np.float32), 1),
    "rcp": function_of(lambda x: x.dtype.type(1) / x, 1),
    "sqrt": function_of(np.sqrt, 1),
}
