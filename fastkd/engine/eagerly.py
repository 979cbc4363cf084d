"""Leaving a compiled graph. Importing this imports torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """function(*args, **options), outside of the graph that is being made."""
    return function(*args, **options)
