"""Attention losses by their definition, and the scores that their tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd.distill.losses import attention

# [N, H, L, L] scores of both sides
SCORES: dict[str, Callable[..., Tensor]] = {
    "kl": attention.attention_kl,
    "tinybert": attention.tinybert,
}


scores = pytest.mark.parametrize("name", SCORES)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def mask_of(kind: str, n: int, length: int) -> Tensor | None:
    """The last sample is one token long."""
    if kind == "none":
        return None
    padding = torch.ones(n, length, dtype=torch.long)
    padding[-1, 1:] = 0
    causal = torch.ones(length, length).tril().expand(n, -1, -1)
    return {"padding": padding, "causal": causal, "both": causal * padding[:, None, :]}[kind]
