"""Where rows start in memory, seen from the 16-byte boundaries that wide loads need."""

from __future__ import annotations

from torch import Tensor

from fastkd.backends.gpu.tune import BYTES_PER_LOAD

# Rows of fewer tiles keep their columns in the same lanes wherever they start, and so their bits:
# most of their time is not in a loop that wider loads would shorten
UNALIGNED_TILES = 2


def on_boundary(x: Tensor) -> bool:
    """Whether all rows of x start on 16 bytes."""
    steps = _steps(x, BYTES_PER_LOAD // x.element_size())
    return x.data_ptr() % BYTES_PER_LOAD == 0 and steps[1:] == (0, 0)


def _steps(x: Tensor, group: int) -> tuple[int, int, int]:
    """How the rows of x [A, B, V] move against groups of columns: (B, outer, inner), reduced."""
    (a, b, _), (outer, inner, _) = x.shape, x.stride()
    if a == 1 or b == 1 or (outer - b * inner) % group == 0:
        step = outer if b == 1 else inner
        return 1, 0 if a * b == 1 else step % group, 0
    return b, outer % group, inner % group


def align_offset(group: int, *operands: Tensor) -> int | None:
    """Columns from a 16-byte boundary to the first row, for `tiles.row_at`; group: of columns.

    None where all rows start on one, or where operands differ in how theirs do: a program reads
    its row of all operands in the same groups of columns. Where a row starts then decides which
    columns share a lane, and its sums may round otherwise than those of an aligned copy.
    """
    first, size = operands[0], operands[0].element_size()
    offset, steps = first.data_ptr() % BYTES_PER_LOAD // size, _steps(first, group)
    if offset == 0 and steps[1:] == (0, 0):
        return None
    for x in operands:
        alike = x.element_size() == size and _steps(x, group) == steps
        # before its storage begins there is no tensor to name
        if (
            not alike
            or x.data_ptr() % BYTES_PER_LOAD != offset * size
            or x.storage_offset() < offset
        ):
            return None
    return offset
