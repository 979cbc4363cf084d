"""Relation losses and the samples that their tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.distill.losses import relations

Loss = Callable[..., Tensor]


FUNCTIONS: dict[str, Loss] = {
    name: getattr(relations, name) for name in ("rkd_distance", "rkd_angle", "sp", "cc", "pkt")
}


def samples(
    n: int = 5, student: int = 4, teacher: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return torch.randn(n, student).to(dtype), torch.randn(n, teacher).to(dtype)
