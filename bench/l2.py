"""What memory delivers: an H200's L2 cache, simulated by its sets over the programs in flight.

`python -m bench.l2` plays a launch of 8192 rows of 128 256 columns tile by tile. Programs take
random turns; when one ends, the next row or split begins. In which order a program reads and writes
its tiles is `order`, which `tests/ptx` holds against what the compiled kernels do. It prints the
bytes of a column that memory delivers in each loop over the row, and with what is written, in all.

The cache has 50 MB (NVIDIA's figure), lines of 128 bytes and 16 ways; ways and the function from
addresses to sets are not documented: a tile's lines fall into sets that its number chooses at
random. Hints of the loads are followed: evict_first leaves before evict_last. The last column is
for half of the cache, which is what remains if both of its halves keep a copy of all that is read.

Simulated, not measured on a GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROWS, VOCAB, ITEMSIZE = 8192, 128_256, 2
CACHE, WAYS = 50 * 1024 * 1024, 16
BAR = 6.2  # bytes of a column, at most
STUDENT, TEACHER, GRAD = range(3)
SIMULATED = "Simulated, not measured on a GPU."


class Access(NamedTuple):
    loop: str  # "sums", "pairs", "grad"
    operand: int
    tile: int
    first: bool  # whether it is evicted before others


class Figures(NamedTuple):
    program: str
    divergence: str
    splits: int  # programs of a row
    in_flight: int  # programs
    loops: dict[str, float]  # bytes of a column that memory delivers in each
    total: float  # with the gradient, which is written once
    half: float  # the same with half of the cache


def order(begin: int, full: int, end: int, expectation: bool) -> Iterator[list[Access]]:
    """What a program does: the accesses to one tile at a time; [begin, full) are whole tiles."""

    def reads(loop: str, tile: int) -> list[Access]:
        return [Access(loop, side, tile, loop == "grad") for side in (STUDENT, TEACHER)]

    def both(loop: str, tile: int) -> list[Access]:
        return [*reads(loop, tile), Access(loop, GRAD, tile, True)]

    yield from (reads("sums", tile) for tile in range(begin, end))
    yield []  # the other programs of the row are waited for
    if not expectation:
        yield from (reads("pairs", tile) for tile in reversed(range(begin, end)))
        yield []
    whole = range(begin, full)
    yield from (both("grad", tile) for tile in (reversed(whole) if expectation else whole))
    yield from (both("grad", tile) for tile in range(full, end))


class Cache:
    """Sets of a few ways; of what is evicted first, then of the rest, the oldest leaves."""

    def __init__(self, size: int, tile: int, seed: int = 0) -> None:
        self.sets = [
            (OrderedDict[int, None](), OrderedDict[int, None]())
            for _ in range(size // (tile * WAYS))
        ]
        self.draw = random.Random(seed)
        self.place: dict[int, int] = {}

    def hit(self, key: int, first: bool) -> bool:
        """Whether a tile is there; it is afterwards."""
        if key not in self.place:
            self.place[key] = self.draw.randrange(len(self.sets))
        early, late = self.sets[self.place[key]]
        found = key in early or key in late
        early.pop(key, None)
        late.pop(key, None)
        (early if first else late)[key] = None
        if len(early) + len(late) > WAYS:
            # not the tile itself
            victims = early if len(early) > (1 if first else 0) else late
            victims.popitem(last=False)
        return found


def simulate(
    rows: int, tiles: int, whole: int, splits: int, resident: int, expectation: bool, cache: Cache
) -> Counter[str]:
    """Tiles that memory delivers, by loop; `resident` programs at a time, in random turns."""
    draw, missed = random.Random(1), Counter[str]()
    bounds = [tiles * i // splits for i in range(splits + 1)]
    todo = ((row, i) for row in range(rows) for i in range(splits))
    waiting: dict[tuple[int, int], int] = {}
    running: list[tuple[int, Iterator[list[Access]], list[int]]] = []

    def begin() -> None:
        row, i = next(todo, (None, 0))
        if row is not None:
            full = min(bounds[i + 1], whole)
            steps = order(bounds[i], full, bounds[i + 1], expectation)
            running.append((row, steps, [0, 0]))

    for _ in range(resident):
        begin()
    while running:
        at = draw.randrange(len(running))
        row, steps, (met, stands) = running[at]
        if stands and waiting[row, met] < splits:
            continue  # its turn is lost
        step = next(steps, None)
        running[at][2][1] = 0
        if step is None:
            running[at] = running[-1]
            running.pop()
            begin()
        elif not step:
            waiting[row, met + 1] = waiting.get((row, met + 1), 0) + 1
            running[at][2][:] = [met + 1, 1]
        else:
            for loop, operand, tile, first in step:
                there = cache.hit((operand * rows + row) * tiles + tile, first)
                if operand != GRAD and not there:
                    missed[loop] += 1
    return missed


def figures(program: str, divergence: str, rows: int = ROWS, vocab: int = VOCAB) -> Figures:
    """Of one launch as the launcher would start it on an H200."""
    from bench.aot.budget import H200
    from fastkd.backends.gpu import cooperative
    from fastkd.backends.gpu.tune import OF_PROCESSOR, registers, tile
    from fastkd.divergence import divergences

    size, expectation = tile(vocab, ITEMSIZE), divergences[divergence].expectation
    columns = size.lanes * size.group
    most = registers("sm_90", size.threads, True) or 0
    splits, resident = 1, OF_PROCESSOR // (64 * size.threads)  # ptxas's own choice
    if program == "cooperative":
        resident = OF_PROCESSOR // (most * size.threads)
        holds = cooperative.Capacity(H200.processors, CACHE)
        row_bytes = 2 * vocab * ITEMSIZE
        splits = cooperative.programs_per_row(rows, vocab, row_bytes, columns, resident, holds)
    tiles, whole = -(-vocab // columns), vocab // columns
    in_flight = resident * H200.processors

    def bytes_by_loop(cache: int) -> dict[str, float]:
        of = Cache(cache, columns * ITEMSIZE)
        missed = simulate(rows, tiles, whole, splits, in_flight, expectation is not None, of)
        return {loop: n * ITEMSIZE / (rows * tiles) for loop, n in missed.items()}

    loops, half = bytes_by_loop(CACHE), bytes_by_loop(CACHE // 2)
    total, less = (round(sum(of.values()) + ITEMSIZE, 2) for of in (loops, half))
    loops = {loop: round(n, 2) for loop, n in loops.items()}
    return Figures(program, divergence, splits, in_flight, loops, total, less)


def markdown(found: list[Figures]) -> str:
    about = (
        f"{SIMULATED} {ROWS} x {VOCAB} of bfloat16 on an H200: bytes of a column that memory "
        f"delivers in each loop over a row, and in all with the gradient (6 at best, {BAR} is the "
        "bar). Written by `python -m bench.l2 --table`, whose help says what is assumed."
    )
    names = ("program", "divergence", "programs of a row", "in flight", "sums", "pairs", "gradient")
    lines = [(*names, "total", "with half the cache"), ["---"] * (len(names) + 2)]
    for one in found:
        loops = [f"{one.loops.get(loop, 0.0):g}" for loop in ("sums", "pairs", "grad")]
        counts = (one.program, one.divergence, str(one.splits), str(one.in_flight))
        lines.append((*counts, *loops, f"{one.total:g}", f"{one.half:g}"))
    return about + "\n\n" + "".join(f"| {' | '.join(words)} |\n" for words in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.l2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--divergences", default="kl,js")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--table", metavar="FOLDER", type=Path, help="writes l2.md and l2.json there"
    )
    given = parser.parse_args()
    found = []
    for divergence in given.divergences.split(","):
        for program in ("plain", "cooperative"):
            found.append(figures(program, divergence, given.rows))
            print(*found[-1], flush=True)
    if given.table:
        from fastkd.distill.serialization import in_lines

        (given.table / "l2.md").write_text(markdown(found))
        document = {"about": SIMULATED, "rows": [one._asdict() for one in found]}
        (given.table / "l2.json").write_text(in_lines(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
