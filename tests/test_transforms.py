"""Transforms of torch.func, forward-mode AD, tracers and tensors that are no plain memory.

A kernel reads the numbers beneath what it is given, so each of these either runs on the reference
or is refused by name; never does one give numbers without the derivative that was asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from common import require
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import fastkd

Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def a_backend_that_a_kernel_runs_on() -> Iterator[None]:
    require("cpu")
    yield
    torch._dynamo.reset()


def _student() -> Tensor:
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(3))


def _losses() -> dict[str, Loss]:
    draw = torch.Generator().manual_seed(5)
    teacher, weight, other = (torch.randn(x, generator=draw) for x in ((4, 9), (9, 5), (9, 6)))
    hidden = torch.randn(4, 6, generator=draw)
    labels, stored = torch.tensor([1, -100, 0, 8]), fastkd.topk_from_logits(teacher, 4)
    per_row = torch.rand(4, generator=draw)

    def linear(s: Tensor) -> Tensor:
        sides = fastkd.LinearLogits(s[:, :5], weight), fastkd.LinearLogits(hidden, other)
        return fastkd.skew_kl_div(*sides, labels=labels)

    return {
        "kl": lambda s: fastkd.kl_div(s, teacher, temperature=2.0),
        "rows": lambda s: fastkd.js_div(s, teacher, reduction="none").sum(),
        "labels": lambda s: fastkd.distillation_loss(s, teacher, labels, label_smoothing=0.1),
        "hard": lambda s: fastkd.distillation_loss(s, teacher, labels, alpha=1.0),
        "tv": lambda s: fastkd.tv_distance(s, teacher, weight=per_row, normalizer=3.0),
        "topk": lambda s: fastkd.reverse_kl_div(s, stored),
        "linear": linear,
        "inplace": lambda s: fastkd.kl_div(1.0 * s, teacher, inplace=True),
    }


LOSSES = _losses()
each_loss = pytest.mark.parametrize("name", LOSSES)


def _gradient(loss: Loss, at: Tensor) -> Tensor:
    """The one that backward gives, from the kernels."""
    x = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


def _dual(loss: Loss) -> Loss:
    """d loss / d(all logits together), in forward mode."""

    def tangent(s: Tensor) -> Tensor:
        with forward_ad.dual_level():
            out = loss(forward_ad.make_dual(s, torch.ones_like(s)))
            return forward_ad.unpack_dual(out).tangent

    return tangent


@each_loss
def test_torch_func_is_backward(name: str) -> None:
    loss, s = LOSSES[name], _student()
    expected = _gradient(loss, s)
    assert expected.any()
    ones = torch.ones_like(s)
    for way in (grad, jacrev, jacfwd):
        torch.testing.assert_close(way(loss)(s), expected)
    torch.testing.assert_close(jvp(loss, (s,), (ones,))[1], expected.sum())
    torch.testing.assert_close(_dual(loss)(s), expected.sum())
    both = torch.stack([s, s.flip(0)])
    torch.testing.assert_close(vmap(loss)(both), torch.stack([loss(x) for x in both]))
    torch.testing.assert_close(
        vmap(grad(loss))(both), torch.stack([_gradient(loss, x) for x in both])
    )


@pytest.mark.parametrize("name", ["labels", "linear"])
def test_torch_func_within_a_graph(name: str) -> None:
    """A registered operator has no derivative in forward mode, and torch would make it 0."""
    loss, s = LOSSES[name], _student()
    for way in (grad(loss), vmap(grad(loss)), _dual(loss)):
        at = s.expand(2, 4, 9) if way is not None and way.__name__ == "wrapped" and False else s
        compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
        if isinstance(way, type(vmap(loss))) and "vmap" in way.__qualname__:
            at = torch.stack([s, s])
        torch.testing.assert_close(compiled(at), way(at))
