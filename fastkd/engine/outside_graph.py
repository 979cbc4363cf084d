"""Leaves a compiled graph. Its import loads the compiler, so that only a compiled call does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call(
    function: Callable[..., Tensor], sides: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    """function(sides, **options), outside of the graph that is being made."""
    return function(sides, **options)
