"""What torch's matrix products are on a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch

from fastkd.backends.base import on_host


@cache
def adds_wide(device: torch.device) -> bool:
    """True where torch adds a product of 16-bit matrices to a float32 one in one go."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and hasattr(torch.ops.aten.addmm, "dtype_out")


_SIXTEEN = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@cache
def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the products of logits of a dtype run.

    float32 where torch has no kernel for 16 bits but a plain loop, which takes 3 to 200 times as
    long: on a CPU that oneDNN does not serve in this dtype. It rounds nothing on the way, too.
    """
    if not on_host(device) or dtype not in _SIXTEEN:
        return dtype
    serves = getattr(torch.ops.mkldnn, _SIXTEEN[dtype], None)
    return dtype if serves is not None and serves() else torch.float32


@cache
def autocast_off(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes a context in which products run in their operands' dtype."""
    return partial(torch.autocast, device.type, enabled=False)
