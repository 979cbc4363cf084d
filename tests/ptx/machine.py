"""Runs a program: several blocks of threads at once, every register one vector over all of them.

Where threads part at a branch, both ways are run under a mask, up to the block in which the ways
meet again (`Program.joins`). A statement becomes a closure once per launch: `operations.bind`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ptx.memory import BASE, Fault, Global, Place, Shared
from ptx.parser import FILES, Address, BasicBlock, Name, Number, Program, Register, Statement

WARP = 32
TYPES = {
    **{f"{kind}{n}": np.dtype(f"u{n // 8}") for kind in "ub" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")},
}
WIDTHS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}
Step = Callable[[Any], None]  # takes the mask of the threads that do it; True: all of them


class Blocks:
    """Some blocks of a launch: their registers, shared memory, and where their threads are."""

    def __init__(
        self,
        program: Program,
        memory: Global,
        params: dict[str, int],
        numbers: list[int],
        grid: int,
        shared: int,
        visits: Counter[int],
    ) -> None:
        self.program, self.memory, self.params, self.grid = program, memory, params, grid
        self.visits = visits  # basic block -> warps that have run it
        threads, count = program.threads, len(numbers)
        self.lanes = threads * count
        self.thread = np.tile(np.arange(threads), count)
        self.block = np.repeat(np.array(numbers, np.int64), threads)
        self.slot = np.repeat(np.arange(count), threads)  # the block, counted from 0 here
        self.warp = self.block * -(-threads // WARP) + self.thread // WARP
        self.shared = Shared(max(shared, program.shared_size), count)
        self.files = {
            file: np.zeros((n, self.lanes), TYPES[WIDTHS[file]])
            for file, n in program.registers.items()
        }
        self.views: dict[Any, Any] = {}
        self.alive = np.ones(self.lanes, bool)
        self.epoch = np.zeros(count, np.int64)
        self.steps: dict[int, list[tuple[Step, Statement]]] = {}

    # ---- operands

    def register(self, at: Register, dtype: Any) -> Any:
        """A register as numbers of a type of its own width or, with a copy in between, another."""
        key = at, dtype
        if key not in self.views:
            row = self.files[at.file][at.index]
            same = row.dtype.itemsize == dtype.itemsize and (row.dtype.kind == "b") == (
                dtype.kind == "b"
            )
            self.views[key] = row.view(dtype) if same else None
        if self.views[key] is None:
            raise Fault(f"%{at.file}{at.index} is used as {dtype}")
        return self.views[key]

    def value(self, operand: Any, dtype: Any) -> Any:
        """An operand as a vector over all lanes, or one number for all."""
        if isinstance(operand, Register):
            return self.register(operand, dtype)
        if isinstance(operand, Number):
            return number(operand, dtype)
        return self.special(operand).astype(dtype)

    def special(self, name: Name) -> Any:
        known = {
            "%tid.x": self.thread,
            "%ctaid.x": self.block,
            "%ntid.x": np.array([self.program.threads]),
            "%nctaid.x": np.array([self.grid]),
            "%laneid": self.thread % WARP,
        }
        if name in known:
            return known[name]
        if name in self.program.shared:
            return np.array([self.program.shared[name]])
        if str(name).endswith((".y", ".z")):
            return np.array([1 if "ntid" in name or "nctaid" in name else 0])
        raise Fault(f"unknown name {name}")

    def offsets(self, address: Address) -> Callable[[], Any]:
        """The address of each lane as it is when called, as signed numbers."""
        if isinstance(address.base, Register):
            wide = TYPES["s64"] if address.base.file == "rd" else TYPES["u32"]
            base = self.register(address.base, wide)
        else:
            base = np.broadcast_to(self.value(address.base, TYPES["s64"]), (self.lanes,))
        return lambda: base.astype(np.int64) + address.offset

    def place(self, lanes: Any) -> Place:
        return Place(self.warp[lanes], self.block[lanes], self.epoch[self.slot[lanes]])

    # ---- running

    def whole_warps(self, mask: Any, what: str) -> None:
        """All threads of a warp take part, or none, in what exchanges numbers among them."""
        if mask is not True:
            some = self.by_warp(mask)
            if (some.any(1) != some.all(1)).any():
                raise Fault(f"{what} by a part of a warp")

    def by_warp(self, lanes: Any) -> Any:
        return lanes.reshape(-1, min(WARP, self.program.threads))

    def barrier(self, mask: Any) -> None:
        """All threads of a block arrive together."""
        here = np.broadcast_to(mask, self.alive.shape)
        inside = np.bincount(self.slot[here], minlength=self.epoch.size)
        living = np.bincount(self.slot[self.alive], minlength=self.epoch.size)
        if ((inside > 0) & (inside < living)).any():
            raise Fault("a barrier that only a part of a block's threads reaches")
        self.epoch += inside > 0

    def _ready(self, i: int) -> list[tuple[Step, Statement]]:
        from ptx.operations import bind

        if i not in self.steps:
            block = self.program.blocks[i]
            self.steps[i] = [(bind(self, s), s) for s in block.statements if s.parts[0] != "bra"]
        return self.steps[i]

    def _do(self, i: int, mask: Any) -> None:
        where = True if mask.all() else mask
        for step, statement in self._ready(i):
            try:
                step(where)
            except Fault as fault:
                raise Fault(f"{self.program.name}: {statement.text}: {fault}") from None
            if statement.parts[0] in ("ret", "exit"):
                where = self.alive & mask

    def run(self) -> Iterator[None]:
        """Runs to the end; yields where other blocks get their turn."""
        blocks, end = self.program.blocks, len(self.program.blocks)
        # (next block, where to stop, mask): the innermost way comes last
        ways: list[tuple[int, int, Any]] = [(0, end, self.alive.copy())]
        while ways:
            i, stop, mask = ways.pop()
            mask = mask & self.alive
            if i in (stop, end) or not mask.any():
                continue
            self.visits[i] += int(np.count_nonzero(self.by_warp(mask).any(1)))
            self._do(i, mask)
            mask = mask & self.alive
            block = blocks[i]
            ways.extend(reversed(list(self._after(block, i, stop, mask))))
            if block.hands_over:
                yield

    def _after(
        self, block: BasicBlock, i: int, stop: int, mask: Any
    ) -> Iterator[tuple[int, int, Any]]:
        """The ways that go on from a block, in the order that they are run."""
        if block.target is None or block.guard is None:
            yield (i + 1 if block.target is None else block.target), stop, mask
            return
        taken = mask & self.predicate(block.guard)
        if not taken.any():
            yield i + 1, stop, mask
        elif (taken == mask).all():
            yield block.target, stop, mask
        else:
            join = self.program.joins[i]
            yield block.target, join, taken
            yield i + 1, join, mask & ~taken
            yield join, stop, mask

    def predicate(self, guard: tuple[Register, bool]) -> Any:
        found = self.register(guard[0], TYPES["pred"])
        return ~found if guard[1] else found


def number(operand: Number, dtype: Any) -> Any:
    if operand.bits:
        found = np.array([operand.value], f"u{operand.bits // 8}").view(f"f{operand.bits // 8}")
        return found.view(dtype) if found.dtype.itemsize == dtype.itemsize else found.astype(dtype)
    if dtype.kind == "b":
        return np.array([operand.value != 0])
    size = dtype.itemsize
    bits = operand.value & ((1 << 8 * size) - 1)
    return np.array([bits], f"u{size}").view(dtype)


LANES = 2048  # at a time: more blocks than fill them take turns
PATIENCE = 200_000  # turns of all blocks together


def execute(
    program: Program,
    memory: Global,
    params: dict[str, int],
    grid: int,
    shared: int = 0,
    seed: int = 0,
    resident: int = 8,
) -> Counter[str]:
    """Runs a launch; returns how many instructions its warps have executed, by opcode.

    Blocks that wait for others (`HANDS_OVER`) take random turns, `resident` of them at a time, in
    a random order.
    """
    draw, numbers = random.Random(seed), list(range(grid))
    together = any(block.hands_over for block in program.blocks)
    draw.shuffle(numbers)
    share = 1 if together else max(1, LANES // program.threads)
    todo = [numbers[i : i + share] for i in range(0, grid, share)]
    visits: Counter[int] = Counter()
    running: list[Iterator[None]] = []
    turns = 0
    with np.errstate(all="ignore"):
        while todo or running:
            while todo and len(running) < resident:
                blocks = Blocks(program, memory, params, todo.pop(), grid, shared, visits)
                running.append(blocks.run())
            chosen = draw.choice(running)
            if next(chosen, "over") == "over":
                running.remove(chosen)
            turns += 1
            if turns > PATIENCE:
                raise Fault(f"{program.name}: blocks wait for ever")
    counts: Counter[str] = Counter()
    for i, times in visits.items():
        for opcode, n in program.blocks[i].counts.items():
            counts[opcode] += n * times
    return counts


__all__ = ["BASE", "FILES", "Blocks", "Fault", "execute", "number"]
