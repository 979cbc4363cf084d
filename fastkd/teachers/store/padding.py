"""Samples of different lengths as one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkd


def teachers(outputs: list[Any], longest: int = 0) -> Any:
    """Samples' outputs as a batch's, padded behind their ends to `longest` rows at least."""
    if isinstance(outputs[0], Tensor):
        return padded(outputs, 0.0, longest)
    first = outputs[0]
    tail = None
    if first.tail_logprob is not None:
        tail = padded([x.tail_logprob for x in outputs], 0.0, longest, rows=first.dim() > 1)
    return fastkd.TopK(
        padded([x.logprobs for x in outputs], -torch.inf, longest, rows=first.dim() > 1),
        padded([x.indices for x in outputs], -1, longest, rows=first.dim() > 1),
        tail_logprob=tail,
        temperature=first.temperature,
        tail=first.tail,
    )


def padded(
    samples: list[Tensor], fill: float, longest: int = 0, *, rows: bool | None = None
) -> Tensor:
    """Samples [L, ...] as [B, longest L, ...]; stacked where they are equally long."""
    first = samples[0]
    if rows is None:
        rows = first.dim() > 0
    most = max(longest, *(x.size(0) for x in samples)) if rows else 0
    if all(x.shape == first.shape for x in samples) and (not rows or first.size(0) == most):
        return torch.stack(samples)
    out = first.new_full((len(samples), most, *first.shape[1:]), fill)
    for row, x in zip(out, samples, strict=True):
        row[: x.size(0)] = x
    return out
