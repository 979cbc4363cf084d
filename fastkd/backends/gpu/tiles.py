"""Where a row lies, and how a tile of its columns is loaded and stored.

A tile is [LANES, GROUP]: GROUP neighbouring columns are one 16-byte load and belong to one lane. A
tile loop covers columns [start, stop) of a row. start is a multiple of a tile, and 0 where the
program has the row to itself. Only the last, partial tile is masked.

OFFSET: the row starts inside a group of columns, as rows of an odd vocabulary do. Its pointer is
then the 16-byte boundary below, start is the number of columns in between, and the first tile is
masked as well. A group that a row shares with its neighbour, or with what lies behind a tensor's
end, is read and written column by column; the rest of such a tile in whole groups.

BY_COLUMN: rows may start anywhere, and yet their columns lie in the lanes as those of aligned rows
do, so that the bits are the same. The compiler is told that the row starts on 16 bytes, as it is of
ALIGNED rows, and lays out a tile by that; and it is given a mask of single columns, by which it
reads and writes them one by one.
"""

import triton
import triton.language as tl

# what UNALIGNED may be; 0: nothing is known, or what a launch's arguments tell
OFFSET, BY_COLUMN, ALIGNED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def scalar(x, ACC: tl.constexpr):
    """A float argument in the accumulation dtype: the interpreter passes Python floats."""
    return tl.full((), x, ACC)


@triton.jit
def row_at(place, per, row, align_offset, const):
    """The start of row [row // per, row % per]; 64 bits, since rows * columns passes 2^31.

    align_offset: columns from the pointer, a 16-byte boundary, to the first row. The boundary below
    the row is then returned.
    """
    offset = (row // per).to(tl.int64) * place.outer + (row % per).to(tl.int64) * place.inner
    if align_offset is not None:
        offset = (offset + align_offset) // const.GROUP * const.GROUP
    x = place.pointer + offset
    if const.UNALIGNED >= BY_COLUMN:
        x = tl.multiple_of(x, 16)
    return x


@triton.jit
def row_span(place, per, row, align_offset, vocab, const):
    """Columns [start, stop) of a row, counted from the pointer that `row_at` returns."""
    start = 0
    if align_offset is not None:
        offset = (row // per).to(tl.int64) * place.outer + (row % per).to(tl.int64) * place.inner
        start = ((offset + align_offset) % const.GROUP).to(tl.int32)
    return start, start + vocab


@triton.jit
def columns(start, const):
    lane = tl.arange(0, const.LANES)[:, None] * const.GROUP
    return start + (lane + tl.arange(0, const.GROUP)[None, :])


@triton.jit
def before(column, stop, const):
    """column < stop; BY_COLUMN in a form of which no two columns are known to be alike."""
    return column + 1 <= stop if const.UNALIGNED == BY_COLUMN else column < stop


@triton.jit
def whole_and_cut(at, start, stop, const):
    """Which groups of a tile lie within [start, stop), and which columns of the other groups do."""
    here = columns(at, const)
    group = at + tl.arange(0, const.LANES)[:, None] * const.GROUP
    complete = (group >= start) & (group + const.GROUP <= stop)
    return complete, (here >= start) & (here < stop) & (complete == 0)


@triton.jit
def load(x, at, start, stop, const, MASKED: tl.constexpr, POLICY: tl.constexpr):
    here = columns(at, const)
    if MASKED and const.UNALIGNED == OFFSET:
        complete, cut = whole_and_cut(at, start, stop, const)
        tile = tl.load(x + here, mask=complete, other=-float("inf"), eviction_policy=POLICY)
        rest = tl.load(x + here, mask=cut, other=-float("inf"), eviction_policy=POLICY)
        tile = tl.where(complete, tile, rest)
    elif MASKED or const.UNALIGNED == BY_COLUMN:
        here_too = before(here, stop, const)
        tile = tl.load(x + here, mask=here_too, other=-float("inf"), eviction_policy=POLICY)
    else:
        tile = tl.load(x + here, eviction_policy=POLICY)
    return tile.to(const.ACC)


@triton.jit
def store(x, tile, at, start, stop, const, MASKED: tl.constexpr):
    here = columns(at, const)
    if MASKED and const.UNALIGNED == OFFSET:
        complete, cut = whole_and_cut(at, start, stop, const)
        tl.store(x + here, tile, mask=complete, eviction_policy="evict_first")
        tl.store(x + here, tile, mask=cut, eviction_policy="evict_first")
    elif MASKED or const.UNALIGNED == BY_COLUMN:
        here_too = before(here, stop, const)
        tl.store(x + here, tile, mask=here_too, eviction_policy="evict_first")
    else:
        tl.store(x + here, tile, eviction_policy="evict_first")


@triton.jit
def unmasked(start, stop, const):
    """Columns [first, full) of whole tiles, and whether a partial tile comes before them."""
    TILE: tl.constexpr = const.LANES * const.GROUP
    full = stop // TILE * TILE
    first = start
    head = False
    if const.UNALIGNED == OFFSET:
        first = tl.cdiv(start, TILE) * TILE
        # a row within a single tile has no head: it is the last tile
        head = (start < first) & (first <= full)
    return first, full, head
