"""What leaves a thread: loads, stores, atomics, barriers, and what a warp's threads exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import BASE, TYPES, WARP, Blocks, Fault, Step
from ptx.parser import Name, Register, Statement, Vector

EVERY = np.arange(WARP)


def _size(s: Statement) -> tuple[int, int]:
    """(bytes of a number, how many of them) of a load or store."""
    kind = next(x for x in reversed(s.parts) if x in TYPES)
    many = next((int(x[1:]) for x in s.parts if x in ("v2", "v4", "v8")), 1)
    return TYPES[kind].itemsize, many


def _registers(operand: Any) -> tuple[Any, ...]:
    return operand if isinstance(operand, Vector) else (operand,)


def _lanes(m: Blocks, mask: Any) -> Any:
    return slice(None) if mask is True else np.flatnonzero(mask)


def _space(m: Blocks, s: Statement) -> Any:
    found = next((x.partition("::")[0] for x in s.parts if x.startswith(("global", "shared"))), "")
    if not found:
        raise NotImplementedError(f"{s.text}: neither global nor shared memory")
    return m.memory if found == "global" else m.shared


def _offsets(m: Blocks, s: Statement, space: Any, address: Any) -> Callable[[Any], Any]:
    """Offsets into a space of the lanes that take part."""
    all_offsets = m.offsets(address)
    if space is m.memory:
        return lambda lanes: all_offsets()[lanes] - BASE
    start = m.slot * space.stride

    def shared(lanes: Any) -> Any:
        inside = all_offsets()[lanes]
        if ((inside < 0) | (inside >= max(space.size, 1))).any():
            raise Fault(f"an access outside of {space.size} bytes of shared memory")
        return inside + start[lanes]

    return shared


def load(m: Blocks, s: Statement) -> Step:
    if "param" in s.parts:
        return _parameter(m, s)
    space, (size, many) = _space(m, s), _size(s)
    offsets = _offsets(m, s, space, s.operands[1])
    out = [m.files[r.file][r.index] for r in _registers(s.operands[0])]
    signed = s.parts[-1].startswith("s")
    ordered = "volatile" not in s.parts  # else others may write meanwhile

    def step(mask: Any) -> None:
        lanes = _lanes(m, mask)
        at = offsets(lanes)
        found = space.read(at, size, many, m.place(lanes) if ordered else None)
        if space is m.memory:
            space.count(at, m.warp[lanes], "read")
        for register, value in zip(out, found, strict=True):
            if signed:
                value = value.view(f"i{size}").astype(f"i{register.dtype.itemsize}")
            register[lanes] = value

    return step


def _parameter(m: Blocks, s: Statement) -> Step:
    to, of = s.operands
    (size, _), out = _size(s), m.files[to.file][to.index]
    bits = m.params[of.base] & ((1 << 8 * size) - 1)
    if s.parts[-1].startswith("s") and bits >> (8 * size - 1):
        bits -= 1 << 8 * size
    value = out.dtype.type(bits & ((1 << 8 * out.dtype.itemsize) - 1))
    return lambda mask: np.copyto(out, value, where=mask)


def store(m: Blocks, s: Statement) -> Step:
    space, (size, _) = _space(m, s), _size(s)
    offsets = _offsets(m, s, space, s.operands[0])
    values = [
        m.files[x.file][x.index] if isinstance(x, Register) else m.value(x, TYPES[f"b{8 * size}"])
        for x in _registers(s.operands[1])
    ]

    def step(mask: Any) -> None:
        lanes = _lanes(m, mask)
        at = offsets(lanes)
        parts = [np.broadcast_to(v, (m.lanes,))[lanes].astype(f"u{size}") for v in values]
        space.write(at, size, parts, m.place(lanes))
        if space is m.memory:
            space.count(at, m.warp[lanes], "write")

    return step


def atomic(m: Blocks, s: Statement) -> Step:
    """One lane after the other, in their order."""
    space, kind = _space(m, s), s.parts[-1]
    apply = next((ATOMICS[x] for x in s.parts if x in ATOMICS), None)
    if apply is None:
        raise NotImplementedError(f"{s.text}: no such atomic operation in tests/ptx")
    offsets = _offsets(m, s, space, s.operands[1])
    operand, dtype = m.value(s.operands[2], TYPES[kind]), TYPES[kind]
    wanted = not (isinstance(s.operands[0], Name) and s.operands[0] == "_")
    out = m.register(s.operands[0], dtype) if wanted else None

    def step(mask: Any) -> None:
        lanes = np.arange(m.lanes)[_lanes(m, mask)]
        at = offsets(lanes)
        space.check(at, dtype.itemsize, "write")
        space.count(at, m.warp[lanes], "write")
        view, values = space.views[dtype.itemsize].view(dtype), np.broadcast_to(operand, m.lanes)
        for lane, where in zip(lanes, at // dtype.itemsize, strict=True):
            before = view[where]
            view[where] = apply(before, values[lane])
            if out is not None:
                out[lane] = before

    return step


ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "exch": lambda old, new: new,
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
}


# ---- a warp


def _members(m: Blocks, s: Statement, operand: Any) -> None:
    """The threads that an exchange names: all of a warp, as in all that Triton writes."""
    mask = m.value(operand, TYPES["u32"])
    if mask.size == 1 and int(mask[0]) != 0xFFFFFFFF:
        raise NotImplementedError(f"{s.text}: an exchange among some threads of a warp")


def shuffle(m: Blocks, s: Statement) -> Step:
    """shfl.sync.MODE: a number of another thread; of one's own where there is none."""
    to = s.operands[0] if isinstance(s.operands[0], Vector) else (s.operands[0],)
    a, by = m.value(s.operands[1], TYPES["b32"]), m.value(s.operands[2], TYPES["b32"])
    out, mode = m.register(to[0], TYPES["b32"]), s.parts[2]
    inside = m.register(to[1], TYPES["pred"]) if len(to) > 1 else None
    _members(m, s, s.operands[4])
    lane, first = m.thread % WARP, np.arange(m.lanes) - m.thread % WARP

    def step(mask: Any) -> None:
        m.whole_warps(mask, s.parts[0])
        move = by.astype(np.int64)
        source = {
            "bfly": lane ^ move,
            "idx": lane * 0 + (move & (WARP - 1)),
            "down": lane + move,
            "up": lane - move,
        }[mode]
        known = (source >= 0) & (source < WARP)
        np.copyto(out, a[first + np.where(known, source, lane)], where=mask)
        if inside is not None:
            np.copyto(inside, known, where=mask)

    return step


def reduce_warp(m: Blocks, s: Statement) -> Step:
    """redux.sync.OPERATION: of all threads of a warp."""
    dtype = TYPES[s.parts[-1]]
    a, out = m.value(s.operands[1], dtype), m.register(s.operands[0], dtype)
    nan = "NaN" in s.parts or dtype.kind != "f"
    function = {
        "max": np.maximum if nan else np.fmax,
        "min": np.minimum if nan else np.fmin,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
    }[s.parts[2]]

    def step(mask: Any) -> None:
        m.whole_warps(mask, s.parts[0])
        whole = function.reduce(np.broadcast_to(a, m.lanes).reshape(-1, WARP), axis=1)
        np.copyto(out, np.repeat(whole, WARP), where=mask)

    return step


def vote(m: Blocks, s: Statement) -> Step:
    """vote.sync.any, .all, .ballot."""
    a = m.value(s.operands[1], TYPES["pred"])
    kind = "b32" if "ballot" in s.parts else "pred"
    out = m.register(s.operands[0], TYPES[kind])

    def step(mask: Any) -> None:
        m.whole_warps(mask, s.parts[0])
        lanes = np.broadcast_to(a, m.lanes).reshape(-1, WARP)
        if "ballot" in s.parts:
            found = (lanes.astype(np.uint64) << EVERY.astype(np.uint64)).sum(1).astype(np.uint32)
        else:
            found = lanes.any(1) if "any" in s.parts else lanes.all(1)
        np.copyto(out, np.repeat(found, WARP), where=mask)

    return step


def matrix(m: Blocks, s: Statement) -> Step:
    """ldmatrix, stmatrix .m8n8.xN.b16: lane 8 i + r has the address of row r of matrix i.

    Lane l holds numbers 2 (l % 4) and 2 (l % 4) + 1 of row l // 4 of each; under .trans, of column
    l // 4.
    """
    loads = s.parts[0] == "ldmatrix"
    address, registers = s.operands[::-1] if loads else s.operands
    offsets = _offsets(m, s, m.shared, address)
    many = [m.register(r, TYPES["b32"]) for r in _registers(registers)]
    first, lane, across = np.arange(m.lanes) // WARP * WARP, m.thread % WARP, "trans" in s.parts

    def step(mask: Any) -> None:
        m.whole_warps(mask, s.parts[0])
        lanes = np.arange(m.lanes)[_lanes(m, mask)]
        starts = np.zeros(m.lanes, np.int64)
        starts[lanes] = offsets(lanes)
        m.shared.check(starts[lanes], 16, "access")
        for i, register in enumerate(many):
            halves = register.view(np.uint16).reshape(-1, 2)
            for j in (0, 1):
                row, column = lane // 4, 2 * (lane % 4) + j
                row, column = (column, row) if across else (row, column)
                at = (starts[first + 8 * i + row] + 2 * column)[lanes]
                if loads:
                    halves[lanes, j] = m.shared.read(at, 2, 1, m.place(lanes))[0]
                else:
                    m.shared.write(at, 2, [halves[lanes, j]], m.place(lanes))

    return step


# ---- threads


def barrier(m: Blocks, s: Statement) -> Step:
    return m.barrier


def leave(m: Blocks, s: Statement) -> Step:
    def step(mask: Any) -> None:
        m.alive &= False if mask is True else ~mask

    return step


def nothing(m: Blocks, s: Statement) -> Step:
    """Hints for caches, and order that this machine has anyway."""
    return lambda mask: None


TABLE: dict[str, Callable[[Blocks, Statement], Step]] = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "shfl": shuffle,
    "redux": reduce_warp,
    "vote": vote,
    "ldmatrix": matrix,
    "stmatrix": matrix,
    "bar": barrier,
    "barrier": barrier,
    "ret": leave,
    "exit": leave,
    "createpolicy": nothing,
    "membar": nothing,
    "fence": nothing,
    "nanosleep": nothing,
}
