"""The one table of tiles: columns, threads and cluster, by width of the row, dtype and GPU.

It was not measured on a GPU yet. It starts from published tile sizes of similar kernels (4096
columns of bfloat16 on 8 warps for Hopper; 8192 on 8 warps for an A100), as far as they compile
without spills (`python -m bench.aot`). The tile never grows with the vocabulary.

FASTKD_GPU_TILE="bytes:threads:ctas" is read when this module is imported, and replaces the table
for every row. It is for measurements (`make gpu`), and today the only way to a cluster. A cluster
of `ctas` blocks works on one row, with a tile `ctas` times as wide. So fewer rows are in flight,
and the L2 cache still holds what the sum loop has read when the gradient loop comes. Where a
cluster cannot work, one block takes the row instead: see `clusters`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import NamedTuple

import triton

BYTES_PER_LOAD = 16
ANY = 1 << 62
VARIABLE = "FASTKD_GPU_TILE"


class Tile(NamedTuple):
    lanes: int  # running maxima and sums held by a program, over all blocks of its cluster
    group: int  # neighbouring columns that share a lane: one 16-byte load
    threads: int  # of one block
    ctas: int = 1  # blocks of a cluster


class Entry(NamedTuple):
    columns: int  # rows up to this wide
    bytes: int  # of a block's tile, of the widest operand
    threads: int
    ctas: int = 1


# a thread holds 16 bytes of each operand in narrow rows, 32 in wide ones, 64 on an A100
_NARROW = (Entry(512, 1024, 64), Entry(2048, 2048, 128))
_WIDE = (*_NARROW, Entry(ANY, 8192, 256))

# architecture -> bytes of an element -> entries by rising width
TABLE: dict[str, dict[int, tuple[Entry, ...]]] = {
    "default": {2: _WIDE, 4: _WIDE, 8: _WIDE},
    "sm_80": {2: _WIDE, 4: _WIDE, 8: _WIDE},
    "sm_90": {2: _WIDE, 4: _WIDE, 8: _WIDE},
    "sm_100": {2: _WIDE, 4: _WIDE, 8: _WIDE},
    "gfx942": {2: _WIDE, 4: _WIDE, 8: _WIDE},
}

# The most registers of a thread, for kernels that read a row several times: (usual rows; rows that
# do not start on 16 bytes, or labels beside a divergence with a pair loop). Without a limit ptxas
# accepts some spills, or half as many resident programs. `python -m bench.aot` shows which limits
# spill nothing. Only CUDA has such a limit.
REGISTERS = (80, 128)
PAIRS, PAIRED_REGISTERS = 100, (128, 128)  # from sm_100 on, which computes in packed pairs
OF_PROCESSOR = 65_536  # registers of a multiprocessor: every CUDA GPU since sm_70

# the first version whose reductions across the blocks of a cluster are said to be right
CLUSTERS_SINCE = (3, 9)
MOST_CTAS = 8  # blocks of a cluster that every Hopper GPU accepts


def override(text: str) -> Entry | None:
    """FASTKD_GPU_TILE as an entry for every row; None where it is empty.

    Raises:
        ValueError: it is not three powers of two with a whole warp's threads and a whole load each.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
    size, threads, ctas = map(int, match.groups()) if match else (0, 0, 0)
    powers = all(x > 0 and x & (x - 1) == 0 for x in (size, threads, ctas))
    if not powers or size < BYTES_PER_LOAD or not 32 <= threads <= 1024 or ctas > MOST_CTAS:
        raise ValueError(
            f"{VARIABLE}: got {text!r}, expected bytes:threads:ctas as powers of two, bytes of at "
            f"least {BYTES_PER_LOAD}, threads from 32 to 1024, ctas up to {MOST_CTAS}, "
            "such as 8192:256:1"
        )
    return Entry(ANY, size, threads, ctas)


OVERRIDE = override(os.environ.get(VARIABLE, ""))


@cache
def registers(arch: str, threads: int, light: bool) -> int | None:
    """The most registers of a thread, by the GPU and a program's threads; None for no limit."""
    if not arch.startswith("sm_"):
        return None
    limits = PAIRED_REGISTERS if int(arch[3:]) >= PAIRS else REGISTERS
    return min(limits[0 if light else 1], OF_PROCESSOR // threads)


def clusters(arch: str, version: str = triton.__version__) -> str | None:
    """Why one row cannot be worked on by a cluster of blocks; None where it can."""
    match = re.fullmatch(r"sm_(\d+)", arch)
    if match is None or int(match[1]) < 90:
        return f"{arch} has no clusters of blocks, which sm_90 brought"
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < CLUSTERS_SINCE:
        since = ".".join(map(str, CLUSTERS_SINCE))
        return f"Triton {version} does not reduce across a cluster's blocks, {since} does"
    return None


@cache
def tile(vocab: int, itemsize: int, arch: str = "default", cluster: bool = True) -> Tile:
    """The tile for rows of `vocab` columns whose widest operand has `itemsize` bytes.

    Args:
        vocab: columns.
        itemsize: bytes of an element: 2, 4 or 8.
        arch: "sm_90", "gfx942", ...; one that the table does not name takes its default.
        cluster: whether the kernel may run on a cluster at all.
    """
    entries = TABLE.get(arch, TABLE["default"])[itemsize]
    entry = OVERRIDE or next(entry for entry in entries if vocab <= entry.columns)
    ctas = entry.ctas if cluster and clusters(arch) is None else 1
    group = BYTES_PER_LOAD // itemsize
    return Tile(entry.bytes // BYTES_PER_LOAD * ctas, group, entry.threads, ctas)
