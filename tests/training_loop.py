"""What the tests of the training loop share: a small net, a loss, a run without a bar."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Loader = list[tuple[Tensor, Tensor]]


def mlp(*, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
