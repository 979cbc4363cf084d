"""What was found by attacking the public face, kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import fastkd

LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"labels": LABELS}], ids=str)
def test_a_teacher_of_inference_mode(options: dict[str, Any]) -> None:
    """torch refuses to save such a tensor for backward; plain torch's softmax makes it usable."""
    student = torch.randn(4, 9, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(4, 9)
    loss = fastkd.kl_div(student, teacher, **options).sum()
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    assert torch.equal(once, again) and once.any()


def test_views_whose_numbers_are_negated() -> None:
    """Kernels read memory as it is; torch negates such a view when it reads it."""
    x, teacher = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(
        fastkd.kl_div(torch._neg_view(x), teacher), fastkd.kl_div(-x, teacher)
    )
    head = fastkd.LinearLogits(torch._neg_view(teacher), torch._neg_view(torch.eye(9)))
    torch.testing.assert_close(fastkd.kl_div(torch._neg_view(x), head), fastkd.kl_div(-x, teacher))
    plain = fastkd.kl_div(x, teacher, reduction="sum")
    weight = torch._neg_view(torch.ones(4))
    torch.testing.assert_close(fastkd.kl_div(x, teacher, weight=weight, reduction="sum"), -plain)
    grads = []
    for upstream in (torch._neg_view(torch.tensor(2.0)), torch.tensor(-2.0)):
        student = x.clone().requires_grad_()
        fastkd.kl_div(student, teacher).backward(upstream)
        grads.append(student.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_modules_are_copied_and_pickled(make: Any) -> None:
    for module in (fastkd.nn.JSDiv(beta=0.3), fastkd.nn.DistillationLoss(divergence="tv")):
        assert repr(make(module)) == repr(module)
    assert make(fastkd.divergences.js(beta=0.2)).param == 0.2


def test_a_second_inplace_backward_knows_the_first_ones_upstream() -> None:
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    loss = fastkd.kl_div(student * 1, teacher, inplace=True)
    upstream = torch.tensor(3.0)
    once = torch.autograd.grad(loss, student, upstream, retain_graph=True)[0].clone()
    upstream.mul_(2)  # the caller's own tensor
    (again,) = torch.autograd.grad(loss, student, torch.tensor(3.0))
    torch.testing.assert_close(once, again)
    loss = fastkd.kl_div(student * 1, teacher, inplace=True)
    torch.autograd.grad(loss, student, torch.tensor(0.0), retain_graph=True)
    if fastkd.info()["cpu"]:
        with pytest.raises(RuntimeError, match="multiplied it by 0"):
            torch.autograd.grad(loss, student)


def test_inplace_compiles() -> None:
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    step = torch.compile(
        lambda s, t: fastkd.kl_div(s * 1, t, inplace=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(step(student, teacher), fastkd.kl_div(student, teacher))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 1e-300}, ValueError, "temperature: got 1e-300"),
        ({"temperature": 10**80}, ValueError, "temperature: got 1000"),
        ({"normalizer": 10**80}, ValueError, "normalizer: got 1000"),
        ({"normalizer": torch.tensor(True)}, TypeError, "normalizer: got a tensor"),
        ({"labels": LABELS, "ignore_index": 2**70}, ValueError, "ignore_index: got 1180"),
        ({"weight": torch.ones(4).to_sparse()}, TypeError, "weight: got layout"),
    ],
    ids=str,
)
def test_numbers_that_no_kernel_holds(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastkd.kl_div(torch.randn(4, 9), torch.randn(4, 9), **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"labels": LABELS}], ids=str)
def test_another_default_device_than_the_logits(options: dict[str, Any]) -> None:
    """Scratch memory belongs where the logits are; the kernels take addresses on trust."""
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    here = fastkd.kl_div(student, teacher, **options)
    with torch.device("meta"):
        there = fastkd.kl_div(student, teacher, **options)
        (grad,) = torch.autograd.grad(there.sum(), student)
    assert torch.equal(here, there) and grad.device.type == "cpu" and grad.any()


def test_transforms_of_torch_func_leave_usable_tensors() -> None:
    teacher, kept = torch.randn(4, 9), []

    def loss(student: torch.Tensor) -> torch.Tensor:
        kept.append(student * 2)
        return fastkd.kl_div(kept[-1], teacher)

    torch.func.grad(loss)(torch.randn(4, 9))
    outlived = kept[0]
    student = torch.randn(4, 9, requires_grad=True)
    fastkd.kl_div(student, outlived).backward()
    assert student.grad is not None and student.grad.any()
    assert fastkd.kl_div(outlived, teacher) > 0


@pytest.mark.parametrize("ignored", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16], ids=["int64", "int16"])
def test_labels_where_all_some_or_no_rows_are_kept(ignored: int, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 2, 9, requires_grad=True), torch.randn(2, 2, 9)
    labels = torch.tensor([[3, 0], [8, 5]], dtype=dtype)
    labels.view(-1)[:ignored] = -100
    for view in (labels, labels.t().contiguous().t()):
        loss = fastkd.distillation_loss(student, teacher, view, alpha=0.5, temperature=3.0)
        (grad,) = torch.autograd.grad(loss, student)
        with fastkd.use_backend("reference"):
            same = fastkd.distillation_loss(student, teacher, view, alpha=0.5, temperature=3.0)
            (same_grad,) = torch.autograd.grad(same, student)
        torch.testing.assert_close(loss, same)
        torch.testing.assert_close(grad, same_grad)
        assert not grad.reshape(4, 9)[:ignored].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_lies_behind_a_row_reaches_no_gradient(
    softcap: float | None, dtype: torch.dtype
) -> None:
    """torch's own bfloat16 product, with AMX, reads behind the rows of a chunk of logits."""
    hidden = torch.randn(64, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(99, 64, dtype=dtype, requires_grad=True)
    student = fastkd.LinearLogits(hidden, weight, softcap=softcap)
    fastkd.kl_div(student, torch.randn(64, 99)).backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()
