"""Numbers as people pass them: Python's own, numpy's, fractions; no tensors, whose host waits."""

from __future__ import annotations

import operator
import sys
from typing import Any

from torch import Tensor

from fastkd.arguments.messages import describe, shown

COLDEST, HOTTEST = 1e-18, 1e18  # temperatures
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


def within(name: str, x: Any, low: float, high: float, expected: str) -> float:
    """A real number from low to high; a TypeError or ValueError names what was expected."""
    number = real(x)
    if number is None:
        raise TypeError(f"{name}: got {describe(x)}, expected {expected}{WAITS}")
    if not low <= number <= high:
        raise ValueError(f"{name}: got {shown(x)}, expected {expected}")
    return number


def temperature_of(x: Any, name: str = "temperature") -> float:
    """A temperature T, whose T^2 and 1 / T are float32 numbers."""
    return within(name, x, COLDEST, HOTTEST, "a positive finite number (from 1e-18 to 1e18)")


def coefficient(name: str, x: Any) -> float:
    """A factor of a part of a loss."""
    return float(within(name, x, 0.0, sys.float_info.max, "a finite number of 0 or more"))


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
