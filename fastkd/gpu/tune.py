"""The one table of tile sizes: columns of a tile and threads of a program, by width of the row.

Not yet measured on a GPU: a thread holds one or two 16-byte loads of each operand (4096 columns of
bfloat16 on 256 threads), which compiles without spills for every divergence, dtype and target
(`python -m bench.aot`). The tile never grows with the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

BYTES_PER_LOAD = 16


class Tile(NamedTuple):
    lanes: int  # running maxima and sums held by a program
    group: int  # neighbouring columns that share a lane: one 16-byte load
    threads: int


# (rows up to this many columns, bytes of a tile, threads): 16 or 32 bytes of each operand a thread
TABLE = (
    (512, 1024, 64),
    (2048, 2048, 128),
    (1 << 62, 8192, 256),
)


def tile(vocab: int, itemsize: int) -> Tile:
    """The tile for rows of `vocab` columns whose widest operand has `itemsize` bytes."""
    size, threads = next((size, threads) for limit, size, threads in TABLE if vocab <= limit)
    group = BYTES_PER_LOAD // itemsize
    return Tile(size // BYTES_PER_LOAD, group, threads)
