"""Where the rows of a case lie: operands of a dtype, each row of more than a tile, and a tail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Layout = Callable[[torch.dtype], Tensor]
ROWS = 2


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(shape)).to(dtype)


def aligned(dtype: torch.dtype) -> Tensor:
    return random(dtype, ROWS, 1024 // dtype.itemsize + 64)


def odd(dtype: torch.dtype) -> Tensor:
    """Too narrow for the alignment offset: columns one by one."""
    return random(dtype, ROWS, 331)


def offset_rows(dtype: torch.dtype) -> Tensor:
    """Rows that start anywhere, of which the last ends with its tensor."""
    return random(dtype, ROWS, 2048 // dtype.itemsize + 37)


def inside(dtype: torch.dtype) -> Tensor:
    """Rows off a boundary in a wider tensor that begins before them."""
    wide = random(dtype, ROWS, 2048 // dtype.itemsize + 41)
    return wide[:, 3:-1]


def strided(dtype: torch.dtype) -> Tensor:
    return random(dtype, 400, ROWS).t().contiguous().t().t()[:, :384]


LAYOUTS = {f.__name__: f for f in (aligned, odd, offset_rows, inside, strided)}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
# where the rest is at stake: one of each path to memory
two_layouts = pytest.mark.parametrize(
    "layout", [aligned, offset_rows], ids=["aligned", "offset_rows"]
)
