"""Gradients through a stored teacher's loss: checked, compiled, in place, again."""

from __future__ import annotations

import pytest
import torch
from common import Backend, each_name
from stored_teachers import differentiated, each_tail, fused, plain, random, stored
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence
from fastkd.engine.topk_rows import topk_rows


@pytest.mark.parametrize("tail", ["bucket", "restrict"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_inplace(kernels: Backend, tail: str, alpha: float) -> None:
    student, teacher = random(kernels, 2, 9000)
    kept = stored(teacher, 20, tail)
    labels = torch.randint(0, 9000, (2,), device=kernels.device)
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_(True)
        logits = leaf * 1.0
        loss = fused(logits, kept, labels, alpha=alpha, inplace=inplace)
        (grad,) = torch.autograd.grad(loss, leaf)
        grads.append(grad)
        if inplace:
            torch.testing.assert_close(logits.detach(), grad)
    assert torch.equal(*grads)


def test_rows_share_threads_and_bits(kernels: Backend) -> None:
    # programs of the interpreter know nothing of threads, and many columns cost them seconds
    rows, vocab = (3, 70_000) if kernels.name == "cpu" else (2, 9000)
    student, teacher = random(kernels, rows, vocab)
    kept = stored(teacher, 64)
    threads, grads = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            grads.append(differentiated(fused, student, kept).student)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_second_backward_and_upstream(backend: Backend) -> None:
    student, teacher = random(backend, 3, 60)
    student.requires_grad_(True)
    for reduction in ("mean", "none"):
        loss = fused(student, stored(teacher, 5), reduction=reduction).sum() * 3.0
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        (second,) = torch.autograd.grad(loss, student)
        assert torch.equal(first, second)


@pytest.mark.not_interpreted
@each_tail
@each_name
def test_gradcheck(backend: Backend, divergence: Divergence, tail: str) -> None:
    if divergence.name == "reverse_kl" and tail == "renormalize":
        pytest.skip("infinite by definition")
    student = torch.randn(2, 6, dtype=torch.float64, device=backend.device, requires_grad=True)
    kept = stored(torch.randn(2, 6, device=backend.device), 3, tail)
    for reduction in ("sum", "none"):
        run = lambda x: fused(x, kept, divergence=divergence, reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, student)
    assert torch.autograd.gradgradcheck(run, student)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradient_of_logprobs(backend: Backend, tail: str) -> None:
    student, teacher = random(backend, 3, 30)
    kept = stored(teacher, 4, tail)
    logprobs = kept.logprobs.masked_fill(kept.indices < 0, -1.0).requires_grad_(True)
    wanted = fastkd.TopK(logprobs, kept.indices, tail=tail)
    (grad,) = torch.autograd.grad(fused(student, wanted), logprobs)
    exact = logprobs.detach().double().requires_grad_(True)
    again = fastkd.TopK(exact, kept.indices, tail=tail)
    loss = plain(student.double(), again, divergence=fastkd.divergences.kl)
    (expected,) = torch.autograd.grad(loss, exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
@pytest.mark.parametrize("tail", ["bucket", "restrict"])
def test_compiled(tail: str, linear: bool) -> None:
    n, v, k, h = 6, 64, 5, 8
    hidden, weight = torch.randn(n, h), torch.randn(v, h)
    kept = stored(torch.randn(n, v), k, tail)

    def step(hidden: Tensor, weight: Tensor, logprobs: Tensor, indices: Tensor) -> Tensor:
        teacher = fastkd.TopK(logprobs, indices, tail=tail)
        student = fastkd.LinearLogits(hidden, weight) if linear else hidden @ weight.t()
        return fastkd.kl_div(student, teacher)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        leaves = [hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
        loss = run(*leaves, kept.logprobs, kept.indices)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_opcheck() -> None:
    kept = stored(torch.randn(3, 20), 4)
    backend = fastkd.backends.choice.pick(kept.device)
    rows = topk_rows(kept, 1.0, 20, None, torch.float32, backend)
    plan = ("kl", 0.0, 1.0, 1.0, 0.0, 0.0, 20, 20, 0.0)
    student = torch.randn(3, 20, requires_grad=True)
    numbers = (None, None, 1.0, 0.0, torch.float32)
    inputs = (*numbers, None, *numbers, None, None, *rows, 0, *plan)
    torch.library.opcheck(torch.ops.fastkd.row_loss, (student, *inputs))
    more = (torch.rand(3), [True, False, False, False, False, False])
    torch.library.opcheck(torch.ops.fastkd.row_grads, (student.detach(), *inputs, *more))
