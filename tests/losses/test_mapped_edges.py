"""Gradients of a mapped teacher, transforms of its losses, and maps that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Backend, each_name, unreadable
from mapped_teachers import (
    V_S,
    V_T,
    differentiated,
    each_normalize,
    operands,
    ours,
)
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

# ---- gradients of the teacher, again and compiled


@pytest.mark.not_interpreted
@each_normalize
@each_name
def test_gradcheck(backend: Backend, divergence: Divergence, normalize: str) -> None:
    student, teacher, columns = operands(backend, (2,), (4, 9), (torch.float64, torch.float64))
    student.requires_grad_()
    run = lambda *x: ours(*x, columns, normalize, divergence=divergence)  # noqa: E731
    assert torch.autograd.gradcheck(run, (student, teacher))
    if divergence.name != "tv":
        assert torch.autograd.gradgradcheck(run, (student, teacher))
    assert torch.autograd.gradcheck(run, (student.detach(), teacher.clone().requires_grad_()))
    assert torch.autograd.gradcheck(run, (student, teacher.clone().requires_grad_()))


@each_normalize
def test_a_linear_teacher_that_learns(backend: Backend, normalize: str) -> None:
    student, _, columns = operands(backend)
    hidden, weight = torch.randn(5, 6), torch.randn(V_T, 6)
    grads = []
    for linear in (True, False):
        leaves = [x.clone().to(backend.device).requires_grad_() for x in (hidden, weight)]
        teacher: Any = fastkd.LinearLogits(*leaves) if linear else leaves[0] @ leaves[1].t()
        grads.append(torch.autograd.grad(ours(student, teacher, columns, normalize), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@each_normalize
@pytest.mark.parametrize("linear", [False, True], ids=["dense", "linear"])
def test_compiled(normalize: str, linear: bool) -> None:
    hidden, weight, head = torch.randn(5, 6), torch.randn(V_T, 6), torch.randn(V_S, 6)
    columns = torch.randperm(V_T)[:V_S]

    def step(hidden: Tensor, head: Tensor) -> Tensor:
        teacher: Any = fastkd.LinearLogits(hidden, weight) if linear else hidden @ weight.t()
        return ours(hidden @ head.t(), teacher, columns, normalize, divergence="js")

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = head.clone().requires_grad_()
        loss = run(hidden, leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_normalize
def test_transforms(normalize: str) -> None:
    student, teacher = torch.randn(3, V_S), torch.randn(3, V_T)
    columns = torch.randperm(V_T)[:V_S]
    one = torch.func.grad(lambda s, t: ours(s, t, columns, normalize, reduction="sum"))
    got = torch.func.vmap(one)(student, teacher)
    want = differentiated(ours, student, teacher, columns, normalize, reduction="sum").student
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_normalize
def test_nothing_is_waited_for(normalize: str) -> None:
    with unreadable():
        student = torch.randn(3, V_S, requires_grad=True)
        ours(student, torch.randn(3, V_T), torch.arange(V_S), normalize).backward()
        assert student.grad is not None


# ---- bad input


def mapped(columns: Any, **options: Any) -> Any:
    return fastkd.MappedLogits(torch.randn(2, 9), columns, **options)


@pytest.mark.parametrize(
    ("message", "error", "columns"),
    [
        (r"columns: got 4 in places 1 and 3, expected each column", ValueError, [0, 4, 5, 4]),
        (r"columns: got 9 in place 2, expected .* 0 to 8", ValueError, [0, 4, 9, 1]),
        (r"columns: got -1 in place 0, .*offsets", ValueError, [-1, 4, 2, 1]),
        (r"columns: got 3 columns .* student's 4; .*vocab_size=3", ValueError, [0, 4, 2]),
    ],
)
@each_normalize
def test_refused_by_the_loss(
    backend: Backend, message: str, error: type[Exception], columns: list[int], normalize: str
) -> None:
    at = torch.tensor(columns, device=backend.device)
    teacher = fastkd.MappedLogits(torch.randn(2, 9, device=backend.device), at, normalize=normalize)  # type: ignore[arg-type]
    student = torch.randn(2, 4, device=backend.device)
    with fastkd.checked(), pytest.raises(error, match=message) as caught:
        fastkd.kl_div(student, teacher)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("message", "error", "make"),
    [
        (
            r"columns: got shape \[0\], expected \[V\], 1 to 9",
            ValueError,
            lambda: mapped(torch.arange(0)),
        ),
        (r"columns: got shape \[10\]", ValueError, lambda: mapped(torch.arange(10))),
        (r"columns: got shape \[2, 2\]", ValueError, lambda: mapped(torch.zeros(2, 2).long())),
        (r"columns: got a tensor .*float32", TypeError, lambda: mapped(torch.zeros(2))),
        (r"columns: got a tensor .*bool.*nonzero", TypeError, lambda: mapped(torch.ones(9).bool())),
        (r"columns: got list", TypeError, lambda: mapped([0, 1])),
        (r"columns: got a tensor on meta", ValueError, lambda: mapped(torch.arange(3).to("meta"))),
        (r"normalize: got 'none'", ValueError, lambda: mapped(torch.arange(3), normalize="none")),
        (
            "teacher: got TopK",
            TypeError,
            lambda: fastkd.MappedLogits(
                fastkd.topk_from_logits(torch.randn(2, 9), 3),  # type: ignore[arg-type]
                torch.arange(3),
            ),
        ),
        (
            r"teacher: got shape \[3, 4\]",
            ValueError,
            lambda: fastkd.kl_div(
                torch.randn(2, 4), fastkd.MappedLogits(torch.randn(3, 9), torch.arange(4))
            ),
        ),
        (
            "student: got .*MappedLogits",
            TypeError,
            lambda: fastkd.kl_div(mapped(torch.arange(4)), torch.randn(2, 4)),
        ),
        (
            "MappedLogits with a group",
            NotImplementedError,
            lambda: fastkd.kl_div(torch.randn(2, 4), mapped(torch.arange(4)), group=object()),
        ),
        (
            "teacher: got .*int64",
            TypeError,
            lambda: fastkd.kl_div(
                torch.randn(2, 4), fastkd.MappedLogits(torch.zeros(2, 9).long(), torch.arange(4))
            ),
        ),
    ],
)
def test_refused(message: str, error: type[Exception], make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert len(str(caught.value)) < 500


@each_normalize
def test_a_bad_column_that_nobody_looks_at(
    backend: Backend, normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.engine.mapped_rows.reads_values", lambda x: False)
    student, teacher, columns = operands(backend)
    student.requires_grad_()
    good = ours(student, teacher, columns, normalize, reduction="none")
    assert good.isfinite().all()
    for bad in (V_T, -1, 2**40):
        columns[2] = bad
        hidden = fastkd.LinearLogits(teacher, torch.eye(V_T, device=backend.device))
        for form in (teacher, hidden):
            loss = ours(student, form, columns, normalize, reduction="none")
            assert loss.isnan().all()
            (grad,) = torch.autograd.grad(loss.sum(), student)
            assert grad.isnan().all()
    assert not teacher.isnan().any()


def test_what_it_says_of_itself() -> None:
    made = mapped(torch.arange(3), normalize="all")
    assert made.shape == (2, 3) and made.size(-1) == 3 and made.dim() == 2
    assert not made.requires_grad and made.dtype == torch.float32
    assert repr(made).startswith("MappedLogits([2, 3] of ") and repr(made).endswith("'all')")
