"""The adversarial term: what reaches the student, and what the discriminator."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import distill
from fastkd.distill.batch import Batch, Outputs
from fastkd.recipes.adversarial import adversarial

V, N = 5, 12


def parts(conditional: bool) -> tuple[distill.Term, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    term = adversarial(classes=V, conditional=conditional)
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    labels = torch.randint(V, (N,))
    labels[::2] = -100
    return term, student, teacher, labels


@pytest.mark.parametrize("conditional", [True, False])
def test_each_side_gets_the_gradient_of_its_own_loss(conditional: bool) -> None:
    term, student, teacher, labels = parts(conditional)
    D = term.module
    assert D is not None
    term.function(Outputs(student), Outputs(teacher), Batch(torch.empty(N), labels)).backward()

    real = torch.where(labels < 0, teacher.argmax(-1), labels)
    real = real if conditional else torch.zeros_like(real)
    fake = torch.full_like(real, V if conditional else 1)
    s = student.detach().requires_grad_()
    (mine,) = torch.autograd.grad(F.cross_entropy(D(s), real), s)
    assert torch.equal(student.grad, mine)
    telling = F.cross_entropy(D(teacher), real) + F.cross_entropy(D(s.detach()), fake)
    theirs = torch.autograd.grad(telling / 2, list(D.parameters()))
    for p, slope in zip(D.parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, slope)


def test_accumulation_changes_no_gradient() -> None:
    images, labels = torch.randn(N, 3), torch.randint(V, (N,))
    torch.manual_seed(1)
    teacher, student = nn.Linear(3, V), nn.Linear(3, V)
    found = []
    for batches in ([slice(0, N)], [slice(0, 2), slice(2, N)]):
        torch.manual_seed(2)
        term, net = adversarial(classes=V), copy.deepcopy(student)
        assert term.module is not None
        learnt = [*net.parameters(), *term.module.parameters()]
        distill.train(
            net,
            [(images[at], labels[at]) for at in batches],
            term,
            teacher=teacher,
            optimizer=torch.optim.SGD(learnt, lr=1.0),
            accumulate=len(batches),
            progress=False,
        )
        found.append([p.detach() for p in learnt])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_a_discriminator_of_ones_own_learns_and_the_teacher_does_not() -> None:
    torch.manual_seed(3)
    D, teacher, student = nn.Linear(V, V + 1), nn.Linear(3, V), nn.Linear(3, V)
    before = [copy.deepcopy(m.state_dict()) for m in (D, teacher, student)]
    term = adversarial(0.5, classes=V, discriminator=D)
    distill.train(student, [torch.randn(N, 3)] * 2, term, teacher=teacher, progress=False)
    changed = [
        any(not torch.equal(old[key], now) for key, now in m.state_dict().items())
        for old, m in zip(before, (D, teacher, student), strict=True)
    ]
    assert changed == [True, False, True]


def test_errors() -> None:
    with pytest.raises(ValueError, match="classes: got 1"):
        adversarial(classes=1)
    term, student, teacher, labels = parts(True)
    batch = Batch(torch.empty(N), labels)
    with pytest.raises(ValueError, match="got no teacher"):
        term.function(Outputs(student), Outputs(None), batch)
    few = fastkd.TopK(*teacher.log_softmax(-1).topk(2))
    with pytest.raises(TypeError, match="got TopK of the teacher"):
        term.function(Outputs(student), Outputs(few), batch)
    with pytest.raises(ValueError, match=f"got 4 logits of the teacher and {V} of the student"):
        term.function(Outputs(student), Outputs(teacher[:, :4]), batch)
