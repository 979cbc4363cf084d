"""Samples of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd


def joined(outputs: list[Any], join: Callable[[list[Tensor], float], Tensor]) -> Any:
    """Teachers' outputs as one; `join` has a part of each, and what fills it."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return join(outputs, 0.0)
    tail = None
    if first.tail_logprob is not None:
        tail = join([x.tail_logprob for x in outputs], 0.0)
    return fastkd.TopK(
        join([x.logprobs for x in outputs], -torch.inf),
        join([x.indices for x in outputs], -1),
        tail_logprob=tail,
        temperature=first.temperature,
        tail=first.tail,
    )


def teachers(outputs: list[Any], longest: int = 0) -> Any:
    """Samples' outputs as a batch's, padded behind their ends to `longest` rows at least."""
    many = outputs[0].dim() > 1
    return joined(outputs, lambda parts, fill: padded(parts, fill, longest, rows=many))


def without(output: Any, ignored: Tensor) -> Any:
    """The same with nothing in the rows ignored, whatever they held."""

    def filled(parts: list[Tensor], fill: float) -> Tensor:
        (x,), rows = parts, ignored.to(output.device)
        return x.masked_fill(rows.unsqueeze(-1) if x.dim() > rows.dim() else rows, fill)

    return joined([output], filled)


def rows_at(output: Any, at: Tensor) -> Any:
    """output[b, at[b, l]] in place of output[b, l]."""
    at = at.to(output.device)
    return output[torch.arange(len(at), device=at.device)[:, None], at]


def padded(
    samples: list[Tensor], fill: float, longest: int = 0, *, rows: bool | None = None
) -> Tensor:
    """Samples [L, ...] as [B, longest L, ...]; stacked where they are equally long."""
    first = samples[0]
    rows = first.dim() > 0 if rows is None else rows
    most = max(longest, *(x.size(0) for x in samples)) if rows else 0
    if all(x.shape == first.shape for x in samples) and (not rows or first.size(0) == most):
        return torch.stack(samples)
    out = first.new_full((len(samples), most, *first.shape[1:]), fill)
    for row, x in zip(out, samples, strict=True):
        row[: x.size(0)] = x
    return out
