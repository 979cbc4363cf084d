"""Gradients of a head's parameters, summed over the chunks of a linear loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.backends.base import Backend
from fastkd.backends.products import adds_wide

BLOCK = 2**18  # elements of a product that is added by hand: it stays in a core's own cache


def buffer(
    backend: Backend, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory that the backend may have used before."""
    return backend.empty_gradient(torch.empty((), dtype=dtype, device=device).expand(shape))


class Sum:
    """A parameter's gradient, the sum of a product per chunk, in float32 or wider.

    once: there is one chunk only, whose product torch accumulates in float32 by itself. A matrix is
    then rounded as it is written: its product waits for its factor (`Linear.finish`).
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, vocab: int, once: bool, backend: Backend):
        # float16 has no room for what waits for the gradient of the loss
        exact = dtype.itemsize >= 4 or (once and dtype == like.dtype != torch.float16)
        self.dtype = dtype if exact else torch.float32
        if once and dtype.itemsize >= 4 and like.dim() == 2:
            self.dtype = like.dtype
        self.like, self.vocab, self.backend = like, vocab, backend
        self.total: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """total[:vocab] += a @ b, in one row for a bias."""
        beta = 0 if self.total is None else 1
        if self.total is None:
            self.total = buffer(self.backend, self.like.shape, self.dtype, self.like.device)
            self.total[self.vocab :].zero_()
        into = self.total[: self.vocab]
        into = into if into.dim() == 2 else into.unsqueeze(0)
        if a.dtype == self.dtype:
            torch.addmm(into, a, b, beta=beta, out=into)
        elif adds_wide(a.device):
            torch.ops.aten.addmm.dtype_out(into, a, b, self.dtype, beta=beta, alpha=1, out=into)
        else:
            step = max(1, BLOCK // max(into.size(1), 1))
            for start in range(0, into.size(0), step):
                at = slice(start, start + step)
                product = torch.mm(a[at], b)
                into[at].add_(product) if beta else into[at].copy_(product)

    def finish(self, by: Tensor | None) -> Tensor:
        """The gradient in the parameter's dtype, times `by`."""
        like = self.like
        if self.total is None:
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        if by is not None:
            self.backend.multiply(self.total, by)
        if self.dtype == like.dtype:
            return self.total
        return buffer(self.backend, like.shape, like.dtype, like.device).copy_(self.total)
