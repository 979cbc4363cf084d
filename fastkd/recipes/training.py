"""Shared by the recipes on the digits: a wide teacher, small students, batches by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distill

from .data import LABELLED, POOL, Digits

Row = tuple[Tensor, ...]


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, ReLU between them."""
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def scaled(steps: int, size: float) -> int:
    return max(2, round(steps * size))


def sample_batches(seed: int, steps: int, rows: int, *columns: Tensor) -> list[Row]:
    """A batch for each step: rows of the columns in an order of the seed's, each once a pass."""
    generator, batches = torch.Generator().manual_seed(seed), list[Row]()
    while len(batches) < steps:
        order = torch.randperm(len(columns[0]), generator=generator)
        batches += [tuple(c[at] for c in columns) for at in order.split(rows)]
    return batches[:steps]


def seen_labels(data: Digits) -> Tensor:
    """Labels of the pool, -100 where a student may not see them."""
    return torch.where(torch.arange(POOL) < LABELLED, data.labels, -100)


def fit(
    model: nn.Module, batches: Sequence[Any], loss: Any, lr: float = 1e-2, **options: Any
) -> Any:
    """The model, trained."""
    distill.train(model, batches, loss, lr=lr, progress=False, **options)
    return model


def teacher(data: Digits, seed: int, *sizes: int) -> nn.Sequential:
    """An MLP (64, 1200, 10 where no sizes are given) of all labels of the pool."""
    torch.manual_seed(seed)
    model = mlp(*(sizes or (64, 1200, 10)))
    batches = sample_batches(seed, 150, 100, data.images, data.labels)
    return fit(model, batches, distill.hard(), lr=1e-3)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * distill.evaluate(model, [(images, labels)]).accuracy


def held_out(model: nn.Module, data: Digits) -> float:
    return accuracy(model, data.held_out, data.held_out_labels)
