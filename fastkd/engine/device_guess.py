"""The upstream gradient that a loss on a GPU expects, which nobody reads on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """`autograd.OnHost` where values stay on a device; `place` as there."""

    __slots__ = ("expected", "place")

    expected: Tensor

    def __init__(self, place: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.place = place
        if place.on_device is None:
            place.on_device = torch.ones((), dtype=dtype, device=device)
        self.expected = place.on_device.clone()

    def settle(self, factor: Tensor) -> Tensor:
        """As `OnHost.settle`; a 0-d bool tensor."""
        place = self.place
        if place is not None:
            # a gradient in place must be divided by it if it was wrong
            usable = factor.isfinite() & (factor != 0.0)
            place.on_device.copy_(torch.where(usable, factor, place.on_device))
            place.busy, self.place = False, None
        a, b = factor, self.expected
        return ((a == b) & ((a != 0.0) | (a.signbit() == b.signbit()))) | (a.isnan() & b.isnan())

    def __del__(self) -> None:
        if self.place is not None:
            self.place.busy = False
