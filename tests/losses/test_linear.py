"""Logits that are never built, by real products: values, gradients of every part, chunks, options.

That every divergence and option is right for a linear operand is shown by the tests of dense
logits, in their linear forms (`common.FORMS`). Here are the products themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Backend, each_dtype, each_name
from linear_parts import (
    EXACT,
    HEADS,
    HS,
    HT,
    NAN,
    N,
    Parts,
    V,
    as_linear,
    as_logits,
    check_parts,
    differentiate_parts,
    each_head,
    each_way,
    make_labels,
    make_parts,
)
from pairwise import pairwise
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from fastkd.divergence import Divergence

# ---- values and gradients


@pairwise
@each_name
@each_dtype
@each_way
def test_every_part_of_both_sides(
    backend: Backend, divergence: Divergence, dtype: torch.dtype, reduction: str
) -> None:
    parts = make_parts(backend, dtype)
    options = {"alpha": 0.3, "temperature": 2.0, "t_squared": True, "label_smoothing": 0.1}
    check_parts(
        parts,
        EXACT,
        make_labels(backend),
        divergence=divergence,
        reduction=reduction,
        **options,
    )


@pairwise
@each_head
@each_dtype
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_heads(
    backend: Backend, head: dict[str, Any], dtype: torch.dtype, chunk_size: int | None
) -> None:
    """Whatever the size of a chunk: results change by rounding only."""
    check_parts(make_parts(backend, dtype), head, chunk_size=chunk_size, reduction="none")


@pairwise
@pytest.mark.parametrize("sides", ["s", "t"])
@each_head
@each_way
def test_the_other_side_is_given(
    backend: Backend, sides: str, head: dict[str, Any], reduction: str
) -> None:
    upstream = torch.rand(N if reduction == "none" else (), device=backend.device) + 0.5
    check_parts(make_parts(backend), head, sides=sides, reduction=reduction, upstream=upstream)


WANTED = [
    ("hidden_s",),
    ("weight_s",),
    ("bias_s",),
    ("hidden_t", "bias_t"),
    ("weight_t",),
    ("hidden_s", "weight_t"),
]


@pytest.mark.parametrize("wrt", WANTED, ids="+".join)
@each_way
def test_parts_by_themselves(backend: Backend, wrt: tuple[str, ...], reduction: str) -> None:
    check_parts(make_parts(backend), HEADS["everything"], wrt=wrt, reduction=reduction)


@pytest.mark.parametrize("v", [1, 63, 64, 65, 129])
def test_vocabularies_of_any_width(backend: Backend, v: int) -> None:
    check_parts(make_parts(backend, torch.bfloat16, v=v), HEADS["bias"])


@each_dtype
def test_dtypes_of_the_two_sides_may_differ(backend: Backend, dtype: torch.dtype) -> None:
    parts = make_parts(backend)
    parts |= {name: parts[name].to(dtype) for name in ("hidden_t", "weight_t", "bias_t")}
    check_parts(parts, HEADS["bias"])


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 2)], ids=str)
@each_way
def test_leading_dimensions(backend: Backend, lead: tuple[int, ...], reduction: str) -> None:
    parts = make_parts(backend, torch.float64, n=max(1, torch.Size(lead).numel()))
    shaped = {**parts, "hidden_s": parts["hidden_s"].view(*lead, HS)}
    shaped["hidden_t"] = parts["hidden_t"].view(*lead, HT)
    ours = fastkd.kl_div(as_linear(shaped, "s"), as_linear(shaped, "t"), reduction=reduction)
    flat = fastkd.kl_div(as_linear(parts, "s"), as_linear(parts, "t"), reduction=reduction)
    torch.testing.assert_close(ours, flat.view(lead if reduction == "none" else ()))


def test_hidden_states_without_the_last_position(backend: Backend) -> None:
    """The shift of a language model: neither hidden states nor given logits are one block."""
    hidden = torch.randn(2, 6, HS, device=backend.device)
    teacher = torch.randn(2, 6, V, device=backend.device)
    weight = torch.randn(V, HS, device=backend.device)
    for pack in (False, True):
        grads = []
        for x, t in (
            (hidden[:, :-1], teacher[:, 1:]),
            (hidden[:, :-1].contiguous(), teacher[:, 1:].contiguous()),
        ):
            x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
            labels = torch.tensor([[0, 1, -100, 2, 3]] * 2, device=backend.device)
            loss = fastkd.js_div(LinearLogits(x, weight, chunk_size=3, pack=pack), t, labels=labels)
            grads.append(torch.autograd.grad(loss, (x, t)))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@each_way
def test_no_rows(backend: Backend, reduction: str) -> None:
    parts = {name: x.requires_grad_() for name, x in make_parts(backend, n=0).items()}
    operands = as_linear(parts, "s", bias=True), as_linear(parts, "t", bias=True)
    loss = fastkd.kl_div(*operands, reduction=reduction).sum()
    for grad in torch.autograd.grad(loss, list(parts.values())):
        assert not grad.any()


# ---- options


@pairwise
@each_way
@pytest.mark.parametrize("pack", [False, True], ids=["all", "packed"])
@each_head
def test_ignored_rows_do_not_matter(
    backend: Backend, reduction: str, pack: bool, head: dict[str, Any]
) -> None:
    """Whatever their hidden states hold: 0 * NaN in a product for a gradient would be NaN."""
    parts, labels = make_parts(backend), make_labels(backend)
    usual = check_parts(parts, head, labels, alpha=0.4, reduction=reduction, pack=pack)
    spoilt = {name: x.clone() for name, x in parts.items()}
    for name in ("hidden_s", "hidden_t"):
        spoilt[name][labels < 0] = NAN

    def loss(leaves: Parts) -> Tensor:
        sides = (as_linear(leaves, side, **head, chunk_size=3, pack=pack) for side in "st")
        options = {"alpha": 0.4, "temperature": 1.0, "t_squared": False, "reduction": reduction}
        return fastkd.distillation_loss(*sides, labels, **options)

    value, grads = differentiate_parts(loss, spoilt, tuple(usual), None)
    assert value.isfinite().all()
    for name, grad in grads.items():
        assert torch.equal(grad, usual[name]), name
        if name.startswith("hidden"):
            assert not grad[labels < 0].any()


@pytest.mark.parametrize("pack", [False, True], ids=["all", "packed"])
@each_way
def test_all_rows_ignored(backend: Backend, pack: bool, reduction: str) -> None:
    parts = {name: torch.full_like(x, NAN) for name, x in make_parts(backend).items()}
    labels = torch.full((N,), -100, device=backend.device)
    leaves = {name: parts[name].requires_grad_() for name in ("hidden_s", "hidden_t")}
    leaves |= {name: torch.ones_like(x) for name, x in parts.items() if name not in leaves}
    sides = (as_linear(leaves, side, pack=pack) for side in "st")
    loss = fastkd.kl_div(*sides, labels=labels, reduction=reduction)
    assert not loss.any()
    for grad in torch.autograd.grad(loss.sum(), (leaves["hidden_s"], leaves["hidden_t"])):
        assert not grad.any()


@each_dtype
@each_way
def test_vocab_size(backend: Backend, dtype: torch.dtype, reduction: str) -> None:
    """Rows of the weight beyond it are never read, and their gradient is exactly 0."""
    parts = make_parts(backend, dtype, v=48, v_t=41)
    for name in ("weight_s", "bias_s", "weight_t", "bias_t"):
        parts[name][33:] = NAN
    leaves = {name: x.requires_grad_() for name, x in parts.items()}
    sides = [as_linear(leaves, side, bias=True, chunk_size=3) for side in "st"]
    loss = fastkd.kl_div(*sides, vocab_size=33, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    short = {
        name: (x if name.startswith("hidden") else x[:33]).detach().requires_grad_()
        for name, x in parts.items()
    }
    sides = [as_linear(short, side, bias=True, chunk_size=3) for side in "st"]
    usual = fastkd.kl_div(*sides, reduction=reduction)
    torch.testing.assert_close(loss, usual)
    expected = torch.autograd.grad(usual.sum(), list(short.values()))
    for name, grad, of_short in zip(parts, grads, expected, strict=True):
        cut = len(of_short)
        torch.testing.assert_close(grad[:cut], of_short)
        assert name.startswith("hidden") or not grad[33:].any()


def test_weight_and_normalizer_get_their_gradients(backend: Backend) -> None:
    parts = make_parts(backend, torch.float64)
    grads = []
    for make in (as_linear, as_logits):
        weight = torch.arange(1.0, N + 1, device=backend.device, dtype=torch.float64)
        normalizer = torch.tensor(3.0, device=backend.device, dtype=torch.float64)
        leaves = weight.requires_grad_(), normalizer.requires_grad_(), parts["weight_s"]
        leaves[2].requires_grad_()
        loss = fastkd.kl_div(
            make(parts, "s"), make(parts, "t"), weight=leaves[0], normalizer=leaves[1]
        )
        grads.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_inplace_changes_nothing(backend: Backend) -> None:
    parts = make_parts(backend)
    given = as_logits(parts, "s").requires_grad_() * 1
    before = given.detach().clone()
    teacher = as_linear(parts, "t")
    loss = fastkd.kl_div(given, teacher, inplace=True)
    torch.autograd.grad(loss, given)
    assert torch.equal(given, before)
    hidden = parts["hidden_s"].requires_grad_()
    results = [
        torch.autograd.grad(fastkd.kl_div(as_linear(parts, "s"), teacher, inplace=inplace), hidden)
        for inplace in (False, True)
    ]
    assert torch.equal(results[0][0], results[1][0])


def test_modules_take_linear_logits(backend: Backend) -> None:
    parts, labels = make_parts(backend), make_labels(backend)
    sides = as_linear(parts, "s"), as_linear(parts, "t")
    for module, function in (
        (fastkd.nn.JSDiv(beta=0.3), lambda s, t, at: fastkd.js_div(s, t, beta=0.3, labels=at)),
        (fastkd.nn.DistillationLoss(), fastkd.distillation_loss),
    ):
        assert torch.equal(module(*sides, labels), function(*sides, labels))
