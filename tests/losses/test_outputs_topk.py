"""`return_outputs=True` against a stored teacher: K columns, and the rest where it has a tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import INF, Backend, each_name
from oracle import assert_values, formula, oracle
from pairwise import pairwise
from stored_teachers import each_size, each_tail, random, stored
from torch import Tensor

import fastkd
from fastkd.divergence import Divergence

IGNORED = -100


def told(
    x: Tensor,
    teacher: fastkd.TopK,
    row: int,
    label: int,
    of: Divergence,
    T: float,
    eps: float,
) -> dict[str, Tensor]:
    """The outputs of one row in x's dtype, by their definitions."""
    whole, named = x, teacher.indices[row] >= 0
    at = teacher.indices[row][named].long()
    logp = teacher.logprobs[row][named].to(x.dtype)
    off = torch.ones_like(x, dtype=torch.bool)
    off[at] = False
    if teacher.tail in ("renormalize", "restrict"):
        logp = F.log_softmax(logp, -1)
    x = x[at] if teacher.tail == "restrict" else x
    logq = F.log_softmax(x / T, -1)
    p, q = logp, logq if teacher.tail == "restrict" else logq[at]
    if teacher.tail == "renormalize":
        p, q = torch.full_like(logq, -1e30).index_put((at,), logp), logq
    if teacher.tail == "bucket" and bool(off.any()):
        assert teacher.tail_logprob is not None
        rest = teacher.tail_logprob[row].to(x.dtype)
        p = torch.cat((logp, rest[None].clamp(min=-1e30)))
        q = torch.cat((q, logq[off].logsumexp(-1, keepdim=True)))
    labels = torch.tensor(label, device=x.device)
    return {
        "soft": formula(of)(p[None], q[None], of.param)[0],
        "hard": F.cross_entropy(whole, labels, label_smoothing=eps),
        "student_entropy": -(logq.exp() * logq).sum(),
        "teacher_entropy": -(p.exp() * p).sum(),
        "student_logsumexp": (x / T).logsumexp(-1),
        "label_logprob": -F.cross_entropy(whole, labels),
    }


@pairwise
@each_name
@each_tail
@each_size
@pytest.mark.parametrize("form", ["dense", "linear", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.interpreted(8)
def test_outputs_of_a_stored_teacher(
    backend: Backend,
    divergence: Divergence,
    tail: str,
    size: tuple[int, int, int],
    form: str,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    if divergence.name == "reverse_kl" and tail == "renormalize":
        pytest.skip("infinite: the teacher excludes columns")
    n, v, k = size
    student, teacher = random(backend, n, v, dtype)
    labels = torch.randint(v, (n,), device=backend.device)
    labels[0] = IGNORED
    kept = stored(teacher, k, tail, temperature)
    operand: Any = student
    if form != "dense":
        eye = torch.eye(v, dtype=dtype, device=backend.device)
        if v > 5000:
            pytest.skip("an identity of this size is too much memory")
        operand = fastkd.LinearLogits(student, eye, chunk_size=2, pack=form == "packed")
    call = {"divergence": divergence, "temperature": temperature, "label_smoothing": 0.1}
    for alpha in (0.0, 0.3):
        for reduction in ("mean", "none"):
            _, outputs = fastkd.distillation_loss(
                operand, kept, labels, alpha=alpha, reduction=reduction, return_outputs=True, **call
            )
            assert outputs.teacher_logsumexp is None
            for row in range(n):
                if row == 0:
                    assert all(x is None or x[0] == 0 for x in outputs)
                    continue
                given = (kept, row, int(labels[row]), divergence, temperature, 0.1)
                torchs, exact = (told(x[row], *given) for x in (student, oracle(student)))
                for name, true in exact.items():
                    if alpha == 0.0 and name in ("hard", "label_logprob"):
                        assert getattr(outputs, name) is None
                        continue
                    assert_values(getattr(outputs, name)[row], torchs[name], true)


@each_tail
def test_outputs_leave_loss_and_gradient_alone(kernels: Backend, tail: str) -> None:
    student, teacher = random(kernels, 3, 700, torch.bfloat16)
    labels = torch.tensor([3, IGNORED, 699], device=kernels.device)
    kept = stored(teacher, 9, tail, 2.0)
    for alpha in (0.0, 0.3):
        found: list[list[Tensor]] = []
        for wanted in (False, True):
            s = student.clone().requires_grad_()
            result: Any = fastkd.distillation_loss(
                s, kept, labels, alpha=alpha, return_outputs=wanted
            )
            loss = result[0] if wanted else result
            loss.backward()
            found.append([loss.detach(), s.grad])  # type: ignore[list-item]
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@each_tail
def test_edges_of_a_stored_teacher(backend: Backend, tail: str) -> None:
    """A column that the student excludes, a certain teacher, a support that has all of the mass."""
    student = torch.randn(3, 40, device=backend.device)
    student[0, 4] = -INF
    student[1, 7] = 120.0
    logprobs = torch.tensor([[-0.5, -2.0], [0.0, -INF], [-0.7, -0.8]], device=backend.device)
    indices = torch.tensor([[3, 5], [7, -1], [0, 39]], device=backend.device)
    _, outputs = fastkd.kl_div(
        student, fastkd.TopK(logprobs, indices, tail=tail), return_outputs=True
    )
    # a bucket that nobody measured has 2^-53
    assert outputs.teacher_entropy[1] == (
        pytest.approx(4.1e-15, rel=1e-2) if tail == "bucket" else 0
    )
    of = student.gather(-1, indices.clamp_min(0))[[0, 2]] if tail == "restrict" else student[[0, 2]]
    logq = oracle(of).log_softmax(-1)
    true = -torch.where(logq < -1e9, 0.0, logq.exp() * logq).sum(-1)
    assert_values(outputs.student_entropy[[0, 2]], true.float(), true)
    assert abs(float(outputs.student_entropy[1])) < 1e-6
    assert outputs.student_logsumexp[1].item() == pytest.approx(120.0, rel=1e-6)
