"""Backward through logits that are never built: again, scaled, checked by differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Backend, each_dtype
from linear_parts import HEADS, NAMES, NAN, as_linear, check_parts, each_head, each_way, make_parts
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd import LinearLogits

# ---- backward


@pairwise
@pytest.mark.parametrize("chunk_size", [3, None])
@each_dtype
@each_way
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_second_backward_gives_the_same_bits(
    backend: Backend, chunk_size: int | None, dtype: torch.dtype, reduction: str, upstream: float
) -> None:
    """Also after the first gradients were overwritten by whoever received them."""
    leaves = {name: x.requires_grad_() for name, x in make_parts(backend, dtype, n=6).items()}
    sides = [as_linear(leaves, side, bias=True, chunk_size=chunk_size) for side in "st"]
    loss = upstream * fastkd.js_div(*sides, reduction=reduction).sum()
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.fill_(NAN)
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, retain_graph=True)
        for one, other in zip(again, kept, strict=True):
            assert torch.equal(one, other)


@pairwise
@each_dtype
@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("upstream", [0.0, 0.3, -2.0, 1024.0])
def test_upstream_gradient(
    backend: Backend, dtype: torch.dtype, chunk_size: int | None, upstream: float
) -> None:
    by = torch.tensor(upstream, device=backend.device)
    parts = make_parts(backend, dtype, n=6)
    check_parts(parts, HEADS["bias"], chunk_size=chunk_size, upstream=by)


def test_hidden_states_overwritten_before_backward(backend: Backend) -> None:
    """The gradients are those of the forward that was."""
    parts = {name: x.requires_grad_() for name, x in make_parts(backend).items()}
    usual = torch.autograd.grad(
        fastkd.kl_div(*(as_linear(parts, x) for x in "st")), parts["weight_s"]
    )
    hidden = parts["hidden_s"] * 1
    loss = fastkd.kl_div(LinearLogits(hidden, parts["weight_s"]), as_linear(parts, "t"))
    with torch.no_grad():
        hidden.fill_(NAN)
    if backend.name == "reference":
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(loss, parts["weight_s"])
    else:
        grad = torch.autograd.grad(loss, parts["weight_s"], retain_graph=True)
        assert torch.equal(grad[0], usual[0])
        with pytest.raises(RuntimeError, match="inplace"):  # a second one needs them anew
            torch.autograd.grad(loss, parts["weight_s"])


@pytest.mark.not_interpreted  # hundreds of losses, three minutes of them
@each_head
@each_way
def test_gradcheck(backend: Backend, head: dict[str, Any], reduction: str) -> None:
    made = make_parts(backend, torch.float64, n=3, v=4, sizes=(2, 3))  # a loss for every element
    parts = {name: x.requires_grad_() for name, x in made.items()}
    labels = torch.tensor([1, -100, 2], device=backend.device)

    def loss(*tensors: Tensor) -> Tensor:
        leaves = dict(zip(NAMES, tensors, strict=True))
        sides = (as_linear(leaves, side, **head, chunk_size=2) for side in "st")
        return fastkd.distillation_loss(*sides, labels, reduction=reduction)

    inputs = tuple(parts[name] for name in NAMES)
    assert torch.autograd.gradcheck(loss, inputs)
    # along one direction at random: each second difference is a loss and its gradients
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("chunk_size", [None, 300])
def test_half_precision_leaves_room_for_the_gradients_scale(
    kernels: Backend, chunk_size: int | None
) -> None:
    """A mean over many rows is small; float16 underflows before a loss scaler's factor comes."""
    parts = make_parts(kernels, torch.float16, n=1000, v=3000)
    by = torch.tensor(32768.0, device=kernels.device)
    check_parts(parts, {}, upstream=by, wrt=("hidden_s", "weight_s"), chunk_size=chunk_size)
