"""Numbers as people pass them: Python's own, numpy's, fractions; no tensors, whose host waits."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

WAITS = "; of a tensor, .item() is the number, for which its device is waited for once"


def real(x: Any) -> float | None:
    """A real number as Python's int or float, or None for what is none."""
    if isinstance(x, bool):
        return None
    if isinstance(x, (int, float)):
        return x
    if isinstance(x, Tensor) or not hasattr(type(x), "__float__") or _is_bool(x):
        return None
    try:
        return float(x)
    except Exception:  # of an array of more than one
        return None


def integer(x: Any) -> int | None:
    """A whole number as Python's int, or None for what is none."""
    if isinstance(x, bool):
        return None
    if isinstance(x, int):
        return x
    if isinstance(x, Tensor) or not hasattr(type(x), "__index__") or _is_bool(x):
        return None
    try:
        return operator.index(x)
    except Exception:
        return None


def _is_bool(x: Any) -> bool:
    return str(getattr(x, "dtype", "")) == "bool"
