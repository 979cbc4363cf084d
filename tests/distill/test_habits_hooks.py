"""Features before an operation in place: what the module gave, not what became of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import distill


class Body(nn.Module):
    """A linear layer, something in place behind it, a head."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.change, self.last = nn.Linear(4, 6), change, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self.first(x)))


def residual(x: Tensor) -> Tensor:
    x += x.detach().flip(1).relu()
    return x


CHANGES = {
    "ReLU": nn.ReLU(inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "ELU": nn.ELU(inplace=True),
    "Dropout": nn.Dropout(0.5, inplace=True),
    "relu_": torch.relu_,
    "residual": residual,
    "mul_": lambda x: x.mul_(2.0),
    "of a view": lambda x: x.view(-1).clamp_(min=0).view_as(x),
    "slice": lambda x: x.index_fill_(1, torch.tensor([0, 2]), 0.0),
}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(8, 4), torch.randint(3, (8,))


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return make(), make()


def step(student: nn.Module, teacher: Any, *terms: distill.Term) -> distill.Step:
    options: dict[str, Any] = {"teacher": teacher, "progress": False}
    return distill.train(student, [batch()], [distill.hard(), *terms], **options)[0]


@pytest.mark.parametrize("name", list(CHANGES))
def test_features_before_an_operation_in_place(name: str) -> None:
    student, teacher = pair(lambda: Body(copy.deepcopy(CHANGES[name])))
    x, _ = batch()
    want = F.mse_loss(student.first(x), teacher.first(x)).item()  # type: ignore[operator]
    term = distill.feature("first", "first", F.mse_loss, name="feature")
    assert step(student, teacher, term).terms["feature"] == pytest.approx(want, rel=1e-6)


def test_the_gradient_is_that_of_the_features_before_the_operation() -> None:
    student, teacher = pair(lambda: Body(nn.ReLU(inplace=True)))
    x, y = batch()
    sgd = torch.optim.SGD(student.parameters(), 0.0)
    term = distill.feature("first", "first", F.mse_loss)
    options: dict[str, Any] = {"teacher": teacher, "optimizer": sgd, "progress": False}
    distill.train(student, [(x, y)], [distill.hard(), term], **options)
    got = student.first.weight.grad.clone()  # type: ignore[union-attr, operator]
    student.zero_grad()
    loss = F.mse_loss(student.first(x), teacher.first(x).detach())  # type: ignore[operator]
    (loss + F.cross_entropy(student(x), y)).backward()
    torch.testing.assert_close(got, student.first.weight.grad)  # type: ignore[union-attr]


class Nested(nn.Module):
    """Gives a tuple and a dict of tensors, which the caller then changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.linear(x)
        return y, {"twice": 2 * y}


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested, self.last = Nested(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.nested(x)
        more["twice"].mul_(0.0)
        return self.last(y.relu_())


def test_features_in_tuples_and_dicts() -> None:
    student, teacher = pair(Changed)
    x, _ = batch()

    def apart(s: Any, t: Any) -> Tensor:
        return F.mse_loss(s[0], t[0]) + F.mse_loss(s[1]["twice"], t[1]["twice"])

    mine, theirs = student.nested(x), teacher.nested(x)  # type: ignore[operator]
    want = apart(mine, theirs).item()
    term = distill.feature("nested", "nested", apart, name="feature")
    assert step(student, teacher, term).terms["feature"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("side", ["peer", "several", "compiled", "data-parallel"])
def test_features_of_every_kind_of_model(side: str) -> None:
    student, teacher = pair(lambda: Body(nn.ReLU(inplace=True)))
    x, _ = batch()
    want = F.mse_loss(student.first(x), teacher.first(x)).item()  # type: ignore[operator]
    source: Any = teacher
    if side == "peer":
        source = distill.PeerTeacher(teacher, distill.hard())
    elif side == "several":
        source = [teacher, teacher]
    elif side == "compiled":
        student = torch.compile(student, backend="eager")  # type: ignore[assignment]
        source = torch.compile(teacher, backend="eager")
    else:
        student = nn.DataParallel(student)
    layer = "0.first" if side == "several" else "first"
    term = distill.feature("first", layer, F.mse_loss, name="feature")
    assert step(student, source, term).terms["feature"] == pytest.approx(want, rel=1e-6)


class Recomputed(Body):
    def forward(self, x: Tensor) -> Tensor:
        inner = super().forward
        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


def test_features_of_a_model_that_is_recomputed() -> None:
    student, teacher = pair(lambda: Recomputed(nn.ReLU(inplace=True)))
    x, _ = batch()
    want = F.mse_loss(student.first(x), teacher.first(x)).item()  # type: ignore[operator]
    term = distill.feature("first", "first", F.mse_loss, name="feature")
    assert step(student, teacher, term).terms["feature"] == pytest.approx(want, rel=1e-6)


def test_hooks_by_hand() -> None:
    net, _ = pair(lambda: Body(nn.ReLU(inplace=True)))
    x, _ = batch()
    with torch.inference_mode(), distill.Hooks(net, ["first"]) as hooks:
        net(x)
        kept = hooks.take()["first"]
    torch.testing.assert_close(kept, net.first(x))  # type: ignore[operator]
