"""Response losses: values, gradients and reductions against the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INPUTS, Backend
from oracle import FLOORS, assert_gradients, assert_values, oracle
from response_losses import LOSSES, PER_ROW, Loss, assert_right, classes, each, reduced, run
from torch import Tensor

from fastkd import distill


def _one_at_200(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Student and teacher sure beyond what a probability can say, of the same or another class."""
    s, t = torch.randn(n, v), torch.randn(n, v)
    row = torch.arange(n)
    s[row, row % v] = 200.0
    t[row, (row + row % 2) % v] = 200.0
    return s, t


LOGITS = {
    **{k: INPUTS[k] for k in ("random", "peaked", "equal", "disjoint", "large", "minus-inf")},
    "offset": INPUTS["offset"],
    "one-at-200": _one_at_200,
}


CASES = [
    pytest.param(loss, make, temperature, id=f"{loss.name}-{name}-{temperature:g}")
    for loss in LOSSES
    for name, make in LOGITS.items()
    for temperature in ([1.0, 4.0, 1000.0] if loss.temperature else [1.0])
    if name != "minus-inf" or loss.masked
]


@pytest.mark.parametrize(("loss", "make", "temperature"), CASES)
def test_value_and_gradient(
    backend: Backend,
    in_chunks: bool,
    loss: Loss,
    make: Callable[[int, int], tuple[Tensor, Tensor]],
    temperature: float,
) -> None:
    options = {"temperature": temperature} if loss.temperature else {}
    s, t = (x.to(backend.device) for x in make(7, 10))
    y = classes(7, 10).to(backend.device)
    if make is INPUTS["minus-inf"]:
        y = torch.where(y == -100, y, 0)  # the column that is never masked
    assert_right(loss, s, t, y, **options)


@each(LOSSES)
@pytest.mark.parametrize("vocab", [2, 3, 40_000])
def test_few_and_many_classes(loss: Loss, vocab: int) -> None:
    """The last one in chunks as they come."""
    s, t = INPUTS["random"](9, vocab)
    assert_right(
        loss, s, t, classes(9, vocab), **({"temperature": 2.0} if loss.temperature else {})
    )


@each(LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(in_chunks: bool, loss: Loss, dtype: torch.dtype) -> None:
    """The loss is float32, or float64, and the gradient as exact as its dtype."""
    s, t = (x.to(dtype) for x in INPUTS["random"](7, 10))
    y = classes(7, 10)
    value, grad = run(loss.ours, s, t.float(), y)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide and grad.dtype == dtype
    options = {"temperature": defaults(loss)["temperature"]} if loss.temperature else {}
    true = run(lambda *a: reduced(loss, *a, **options), oracle(s), oracle(t.float()), y)
    assert_values(value, true[0], true[0], 9 * options.get("temperature", 1.0) ** 2)
    assert_gradients(grad, true[1], true[1], FLOORS[wide] * 9 * options.get("temperature", 1.0))


def warm(loss: Loss) -> dict[str, Any]:
    return {"temperature": 2.0} if loss.temperature else {}


def defaults(loss: Loss) -> dict[str, Any]:
    return dict(loss.ours.__kwdefaults__)


@each(PER_ROW)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(in_chunks: bool, loss: Loss, reduction: str, weighted: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(7)
    elif reduction == "mean":
        options["normalizer"] = torch.tensor(3)
    if loss.temperature:
        options["temperature"] = 2.0
    assert_right(loss, s, t, classes(7, 10), **options)


@each(PER_ROW)
def test_leading_dimensions_and_columns_in_use(in_chunks: bool, loss: Loss) -> None:
    s, t = (x.view(2, 3, 11) for x in INPUTS["random"](6, 11))
    y = torch.randint(0, 8, (2, 3))
    t = F.pad(t, (0, 2), value=math.nan)
    s[..., 8:] = math.nan
    value, grad = run(loss.ours, s, t, y, vocab_size=8, reduction="none")
    assert value.shape == (2, 3)
    flat = (x[..., :8].reshape(6, 8) for x in (s, t))
    alone, its = run(loss.ours, *flat, y.view(6), reduction="none")
    torch.testing.assert_close(value.view(6), alone)
    torch.testing.assert_close(grad[..., :8].reshape(6, 8), its)
    assert (grad[..., 8:] == 0).all()


@each(LOSSES)
def test_strided_operands(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](8, 12)
    y = torch.randint(0, 10, (4,))
    a, b = s[::2, 1:11], t[1::2, 2:]
    value, grad = run(loss.ours, a, b, y)
    again, its = run(loss.ours, a.contiguous(), b.contiguous(), y)
    torch.testing.assert_close(value, again)
    torch.testing.assert_close(grad, its)


@each([loss for loss in LOSSES if loss.name != "nkd"])
def test_teacher_gets_its_gradient(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y = classes(7, 10)
    options = warm(loss)
    _, grad = run(lambda b, a, y: loss.ours(a, b, y, **options), t, s, y)
    _, true = run(lambda b, a, y: reduced(loss, a, b, y, **options), oracle(t), oracle(s), y)
    assert_gradients(grad, true, true, FLOORS[grad.dtype] * 20)


def test_nkd_refuses_a_teacher_that_wants_a_gradient() -> None:
    s, t = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"teacher: got .* requires grad, expected .*detach"):
        distill.nkd(s, t, torch.zeros(2, dtype=torch.long))


@each(PER_ROW)
def test_backward_again_and_upstream(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    s.requires_grad_()
    value = loss.ours(s, t, classes(7, 10))
    (first,) = torch.autograd.grad(value, s, retain_graph=True)
    (again,) = torch.autograd.grad(3 * value, s)
    torch.testing.assert_close(again, 3 * first)


@each(LOSSES)
def test_second_derivative(in_chunks: bool, loss: Loss) -> None:
    s, t = (x.double() / 3 for x in INPUTS["random"](4, 5))
    y = torch.tensor([0, 4, -100, 2])
    s.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss.ours(x, t, y), s)


@each(PER_ROW)
def test_weight_gets_its_gradient(in_chunks: bool, loss: Loss) -> None:
    s, t = INPUTS["random"](7, 10)
    y, weight = classes(7, 10), torch.rand(7, requires_grad=True)
    (grad,) = torch.autograd.grad(loss.ours(s, t, y, weight=weight, reduction="sum"), weight)
    torch.testing.assert_close(grad, loss.ours(s, t, y, reduction="none"))


def test_teacher_made_in_inference_mode(in_chunks: bool) -> None:
    s, t = INPUTS["random"](7, 10)
    with torch.inference_mode():
        other = t.clone()
    for loss in LOSSES:
        torch.testing.assert_close(
            run(loss.ours, s, other, classes(7, 10)), run(loss.ours, s, t, classes(7, 10))
        )
