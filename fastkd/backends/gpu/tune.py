"""The one table of tiles: columns and threads, by width of the row.

It was not measured on a GPU yet. It starts from published tile sizes of similar kernels (4096
columns of bfloat16 on 8 warps for Hopper; 8192 on 8 warps for an A100), as far as they compile
without spills (`python -m bench.aot`). The tile never grows with the vocabulary.

FASTKD_GPU_TILE="bytes:threads" is read when this module is imported, and replaces the table for
every row. It is for measurements (`make gpu`).
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import NamedTuple

BYTES_PER_LOAD = 16
ANY = 1 << 62
VARIABLE = "FASTKD_GPU_TILE"


class Tile(NamedTuple):
    lanes: int  # running maxima and sums held by a program
    group: int  # neighbouring columns that share a lane: one 16-byte load
    threads: int


class Entry(NamedTuple):
    columns: int  # rows up to this wide
    bytes: int  # of a tile, of the widest operand
    threads: int


# A thread holds 16 bytes of each operand in narrow rows, 32 in wide ones. The same for every GPU
# and dtype until one has measured something else.
TABLE = (Entry(512, 1024, 64), Entry(2048, 2048, 128), Entry(ANY, 8192, 256))

# The most registers of a thread, for kernels that read a row several times: (usual rows; rows that
# do not start on 16 bytes, or labels beside a divergence with a pair loop). Without a limit ptxas
# accepts some spills, or half as many resident programs. `python -m bench.aot` shows which limits
# spill nothing. Only CUDA has such a limit.
REGISTERS = (80, 128)
PAIRS, PAIRED_REGISTERS = 100, (128, 128)  # from sm_100 on, which computes in packed pairs
OF_PROCESSOR = 65_536  # registers of a multiprocessor: every CUDA GPU since sm_70


def override(text: str) -> Entry | None:
    """FASTKD_GPU_TILE as an entry for every row; None where it is empty.

    Raises:
        ValueError: it is not two powers of two with a whole warp's threads and a whole load each.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    size, threads = map(int, match.groups()) if match else (0, 0)
    powers = all(x > 0 and x & (x - 1) == 0 for x in (size, threads))
    if not powers or size < BYTES_PER_LOAD or not 32 <= threads <= 1024:
        raise ValueError(
            f"{VARIABLE}: got {text!r}, expected bytes:threads as powers of two, bytes of at least "
            f"{BYTES_PER_LOAD}, threads from 32 to 1024, such as 8192:256"
        )
    return Entry(ANY, size, threads)


OVERRIDE = override(os.environ.get(VARIABLE, ""))


@cache
def registers(arch: str, threads: int, light: bool) -> int | None:
    """The most registers of a thread, by the GPU and a program's threads; None for no limit."""
    if not arch.startswith("sm_"):
        return None
    limits = PAIRED_REGISTERS if int(arch[3:]) >= PAIRS else REGISTERS
    return min(limits[0 if light else 1], OF_PROCESSOR // threads)


@cache
def tile(vocab: int, itemsize: int) -> Tile:
    """The tile for rows of `vocab` columns whose widest operand has `itemsize` bytes: 2, 4 or 8."""
    entry = OVERRIDE or next(entry for entry in TABLE if vocab <= entry.columns)
    return Tile(entry.bytes // BYTES_PER_LOAD, BYTES_PER_LOAD // itemsize, entry.threads)
