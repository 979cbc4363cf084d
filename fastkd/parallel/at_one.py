"""What a row costs at T = 1, hard labels and z-loss, over the own columns of a rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends.base import LossSpec

INF = float("inf")


def finite(top: Tensor) -> Tensor:
    return torch.where(top == -INF, 0.0, top)


def entropy(top: Tensor, total: Tensor, at_label: Tensor, drift: Tensor, spec: LossSpec) -> Tensor:
    """log-sum-exp - (1 - smoothing) s[label] - smoothing * mean of s, relative to the maximum."""
    out = total.log() + (1.0 - spec.smoothing) * (top - at_label)
    if spec.smoothing != 0.0:
        out = out - spec.smoothing / spec.classes * drift
    return torch.where(total == 0, torch.nan, out)


def log_sum(stats: Tensor) -> Tensor:
    """The log-sum-exp at T = 1; NaN where the row is impossible."""
    return torch.where(stats[:, 1] == 0, torch.nan, stats[:, 0] + stats[:, 1].log())


def hard_gradient(x: Tensor, stats: Tensor, place: Tensor | None, spec: LossSpec) -> Tensor:
    """The gradient of what is taken at T = 1, over the own columns of some rows."""
    q = (x - finite(stats[:, 0])[:, None]).exp() / stats[:, 1, None]
    unit = torch.full_like(stats[:, 0], spec.hard)
    if spec.z_loss != 0.0:
        unit += 2.0 * spec.z_loss * log_sum(stats)
    q = q * unit.unsqueeze(-1)
    if place is None:
        return q
    out = F.pad(q - spec.hard * spec.smoothing / spec.classes, (0, 1))
    at = torch.where(place >= 0, place, x.size(1)).unsqueeze(-1)
    sure = torch.full_like(at, spec.hard * (spec.smoothing - 1.0), dtype=x.dtype)
    return out.scatter_add(-1, at, sure)[:, : x.size(1)]
