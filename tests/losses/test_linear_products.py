"""Which matrix products run: none that nobody needs, under autocast and autograd's modes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Backend
from linear_parts import (
    HS,
    NAMES,
    NAN,
    N,
    V,
    as_linear,
    check_parts,
    each_head,
    each_way,
    make_labels,
    make_parts,
    multiply_in,
)
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import LinearLogits
from fastkd.backends import products as products_of
from fastkd.engine import linear as chunked

# ---- the dtype of the products


@pairwise
@pytest.mark.parametrize("products", [None, torch.float32], ids=["16 bits", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_head
@pytest.mark.parametrize("chunk_size", [3, None])
@each_way
@pytest.mark.parametrize("pack", [False, True], ids=["all", "packed"])
def test_products_of_16_bits_and_of_float32(
    kernels: Backend,
    products: torch.dtype | None,
    dtype: torch.dtype,
    head: dict[str, Any],
    chunk_size: int | None,
    reduction: str,
    pack: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either way of a machine, on any; a part of the weight at a time has an odd end."""
    multiply_in(monkeypatch, products)
    monkeypatch.setattr(chunked, "WEIGHT", 10 * HS)
    labels = make_labels(kernels)
    upstream = torch.rand(N, device=kernels.device) if reduction == "none" else None
    check_parts(
        make_parts(kernels, dtype), head, labels, alpha=0.3, chunk_size=chunk_size, pack=pack,
        reduction=reduction, upstream=upstream,
    )  # fmt: skip


def test_products_are_float32_where_torch_only_loops_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, ask = torch.device("cpu"), products_of.multiplied_in.__wrapped__  # past its cache
    for dtype, name in products_of._SIXTEEN.items():
        for serves in (True, False):
            # a build of torch without oneDNN has no such question
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda serves=serves: serves, raising=False)
            assert ask(dtype, here) == (dtype if serves else torch.float32)
        assert ask(dtype, torch.device("cuda")) == dtype
    assert ask(torch.float64, here) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_products_leave_one_rounding(
    kernels: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of hidden states and weight are float64's, rounded once, in one chunk or many.

    A GPU multiplies in 16 bits: what its logits, their gradient and the products round comes in.
    """
    multiply_in(monkeypatch, torch.float32)
    most = 1.001 if products_of.multiplied_in(dtype, kernels.device) == torch.float32 else 10.0
    made = {"hidden": torch.randn(N, HS), "weight": torch.randn(V, HS)}
    own = {name: x.to(kernels.device, dtype).requires_grad_() for name, x in made.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in own.items()}
    teacher = torch.randn(N, V, device=kernels.device)
    true = fastkd.kl_div(wide["hidden"] @ wide["weight"].t(), teacher.double(), temperature=2.0)
    exact = torch.autograd.grad(true * 37.0, list(wide.values()))
    for chunk_size in (3, None):
        student = LinearLogits(*own.values(), chunk_size=chunk_size)
        loss = fastkd.kl_div(student, teacher, temperature=2.0)
        grads = torch.autograd.grad(loss * 37.0, list(own.values()))
        for grad, truth in zip(grads, exact, strict=True):
            error, once = (float((x.double() - truth).norm()) for x in (grad, truth.to(dtype)))
            assert error <= most * once


# ---- what is not needed is not computed


class Products(TorchDispatchMode):
    """Counts the matrix products inside, by the sizes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.numel():
            self.made.append(list(out.shape))
        return out


@pytest.mark.parametrize(
    "wrt", [(), ("hidden_s",), ("weight_s",), ("hidden_s", "weight_s")], ids=str
)
def test_frozen_parts_cost_no_product(kernels: Backend, wrt: tuple[str, ...]) -> None:
    parts = {name: x.requires_grad_(name in wrt) for name, x in make_parts(kernels).items()}
    sides = [as_linear(parts, side) for side in "st"]
    with Products() as products:
        loss = fastkd.kl_div(*sides)
        if wrt:
            torch.autograd.grad(loss, [parts[name] for name in wrt])
    expected = [[N, V], [N, V]]
    expected += [[N, HS]] if "hidden_s" in wrt else []
    expected += [[V, HS]] if "weight_s" in wrt else []
    assert products.made == expected


def test_packed_rows_take_no_product(kernels: Backend) -> None:
    parts, labels = make_parts(kernels), make_labels(kernels)
    kept = int((labels >= 0).sum())
    with Products() as products:
        fastkd.kl_div(as_linear(parts, "s", pack=True), as_linear(parts, "t"), labels=labels)
    assert products.made == [[kept, V], [kept, V]] and kept < N


def test_the_only_chunks_weight_product_waits_for_backward(kernels: Backend) -> None:
    parts = {name: x.requires_grad_(name == "weight_s") for name, x in make_parts(kernels).items()}
    sides = [as_linear(parts, side) for side in "st"]
    with Products() as products:
        loss = fastkd.kl_div(*sides)
        assert products.made == [[N, V], [N, V]]
        loss.backward()
    assert products.made[2:] == [[V, HS]]


def test_a_teacher_that_has_no_part_takes_no_product(kernels: Backend) -> None:
    """Only the labels count: it is not read, and what it is made of has a gradient of 0."""
    parts = make_parts(kernels)
    parts["hidden_t"].fill_(NAN)
    parts = {name: x.requires_grad_() for name, x in parts.items()}
    teacher = as_linear(parts, "t", bias=True)
    with Products() as products:
        student, labels = as_linear(parts, "s"), make_labels(kernels)
        loss = fastkd.distillation_loss(student, teacher, labels, alpha=1.0)
    assert products.made == [[N, V], [N, HS]]
    for name, grad in zip(
        NAMES[3:], torch.autograd.grad(loss, [parts[n] for n in NAMES[3:]]), strict=True
    ):
        assert not grad.any(), name


# ---- tied weights, autocast, modes of autograd


def test_tied_embeddings(backend: Backend) -> None:
    """One parameter, looked up and multiplied by: the two gradients meet in it."""
    tokens = torch.randint(V, (N,), device=backend.device)
    teacher = torch.randn(N, V, device=backend.device)
    weight = torch.randn(V, HS, device=backend.device).requires_grad_()
    grads = []
    for make in (LinearLogits, torch.nn.functional.linear):
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        loss = fastkd.kl_div(make(hidden, weight), teacher)
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


def test_one_weight_on_both_sides(backend: Backend) -> None:
    weight = torch.randn(V, HS, device=backend.device).requires_grad_()
    x, y = (torch.randn(N, HS, device=backend.device) for _ in range(2))
    grads = []
    for make in (LinearLogits, torch.nn.functional.linear):
        loss = fastkd.skew_kl_div(make(x, weight), make(y, weight))
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


@pairwise
@pytest.mark.parametrize("inside", [True, False], ids=["loss-inside", "loss-outside"])
@pytest.mark.parametrize("chunk_size", [3, None])
@each_way
def test_autocast(backend: Backend, inside: bool, chunk_size: int | None, reduction: str) -> None:
    """float32 parameters, products in bfloat16 as the model's own would be, float32 gradients."""
    parts = {name: x.requires_grad_() for name, x in make_parts(backend).items()}
    results = []
    for linear in (True, False):
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            if linear:
                sides: Any = [
                    as_linear(parts, side, bias=True, chunk_size=chunk_size) for side in "st"
                ]
                assert sides[0].dtype == torch.bfloat16
            else:
                sides = [
                    torch.nn.functional.linear(
                        *(parts[f"{x}_{side}"] for x in ("hidden", "weight", "bias"))
                    )
                    for side in "st"
                ]
            loss = fastkd.js_div(*sides, reduction=reduction) if inside else None
        loss = fastkd.js_div(*sides, reduction=reduction) if loss is None else loss
        results.append((loss, *torch.autograd.grad(loss.sum(), list(parts.values()))))
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_made_without_grad(backend: Backend) -> None:
    """As logits would be: made under no_grad, it takes no part in autograd."""
    parts = {name: x.requires_grad_() for name, x in make_parts(backend).items()}
    with torch.no_grad():
        teacher = as_linear(parts, "t", bias=True)
    assert not teacher.requires_grad and as_linear(parts, "s").requires_grad
    loss = fastkd.kl_div(as_linear(parts, "s"), teacher)
    assert torch.autograd.grad(loss, parts["weight_t"], allow_unused=True) == (None,)


def test_a_teacher_of_inference_mode(backend: Backend) -> None:
    parts = {name: x.requires_grad_(name.endswith("_s")) for name, x in make_parts(backend).items()}
    with torch.inference_mode():
        teacher = LinearLogits(parts["hidden_t"] * 1, parts["weight_t"])
    for reduction in ("mean", "none"):
        loss = fastkd.kl_div(as_linear(parts, "s"), teacher, reduction=reduction).sum()
        once = torch.autograd.grad(loss, parts["weight_s"], retain_graph=True)
        again = torch.autograd.grad(loss, parts["weight_s"])
        assert torch.equal(once[0], again[0]) and once[0].any()
