"""Noise on inputs and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastkd.arguments.messages import shown

from .batch import Batch, mapped


def input_noise(std: float, *, teacher: str = "clean") -> Callable[[Batch], Batch]:
    """Gaussian noise on floating-point inputs, for `train(transform=...)`: x + std * N(0, 1).

    Args:
        std: standard deviation in the inputs' units, at least 0.
        teacher: "clean" leaves the teacher's inputs alone, "noisy" shows it the student's.

    Paper: Xie et al. 2020, noisy student, arXiv 1911.04252.
    """
    if not std >= 0:
        raise ValueError(f"std: got {shown(std)}, expected a number >= 0")
    if teacher not in ("clean", "noisy"):
        raise ValueError(f"teacher: got {shown(teacher)}, expected 'clean' or 'noisy'")

    def disturb(x: Tensor) -> Tensor:
        return x + std * torch.randn_like(x) if x.is_floating_point() else x

    def transform(batch: Batch) -> Batch:
        if batch.teacher_inputs is None and teacher == "clean":
            batch.teacher_inputs = batch.inputs
        batch.inputs = mapped(batch.inputs, disturb)
        return batch

    return transform


@contextmanager
def weight_noise(model: nn.Module, std: float) -> Iterator[None]:
    """A context in which each trainable weight w is w + std * sd(w) * N(0, 1), exact w after it.

    Gradients taken inside are those at the disturbed weights.

    Args:
        model: module.
        std: standard deviation as a share of each parameter's own; 0 changes nothing.
    """
    if not std:
        yield
        return
    weights = [p for p in model.parameters() if p.requires_grad and p.numel() > 1]
    with torch.no_grad():
        kept = [p.detach().clone() for p in weights]
        for p in weights:
            p.add_(torch.randn_like(p) * (std * p.std()))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)
