"""Features of hooked layers, and projectors of the trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_runs import Tokens, equal, mlp, mse, quiet, ragged, weights

from fastkd import distill


def conv(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


def test_features_teach_through_a_projector_of_the_trainer(loader: Any) -> None:
    teacher, student = mlp(16), mlp(4)
    names = set(student.state_dict())
    projector = distill.projector(student, teacher, loader[0][0], "1", "1")
    before = [p.clone() for p in projector.parameters()]
    term = distill.feature("1", "1", mse, 2.0, projector=projector, name="hint")
    steps = quiet(student, loader, [distill.hard(), term], teacher=teacher, epochs=30, lr=1e-2)
    assert steps[-1].terms["hint"] < 0.5 * steps[0].terms["hint"]
    assert all(not torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    assert set(student.state_dict()) == names
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_projector_joins_an_optimizer_that_was_given(loader: Any) -> None:
    teacher, student = mlp(16), mlp(4)
    projector = nn.Linear(4, 16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    term = distill.feature("1", "1", mse, projector=projector)
    for _ in range(2):  # once only
        quiet(student, loader, term, teacher=teacher, optimizer=optimizer)
        assert [len(g["params"]) for g in optimizer.param_groups] == [6]


def test_projectors_fit_the_shapes() -> None:
    x = torch.randn(2, 1, 6, 6)
    small, large = conv(3), conv(5)
    assert distill.projector(small, large, x, "1", "1")(small[:2](x)).shape == (2, 5, 6, 6)
    assert distill.projector(small, large, x, "2", "1")(small[:3](x)).shape == (2, 5, 6, 6)
    assert distill.projector(small, large, x, "3", "3")(small[:4](x)).shape == (2, 20)
    assert isinstance(distill.projector(small, large, x, "4", "4"), nn.Identity)
    assert small.training and large.training
    with pytest.raises(ValueError, match=r"\[2, 3, 6, 6\] of '1' and \[2, 20\] of '3', expected"):
        distill.projector(small, large, x, "1", "3")


def test_layer_that_does_not_exist_lists_near_names(loader: Any) -> None:
    student, teacher = Tokens(), Tokens()
    ids, labels = ragged()
    for term, name in (
        (distill.feature("bodi", "body", mse), "bodi"),
        (distill.feature("body", "bodi.0", mse), "bodi.0"),
    ):
        with pytest.raises(ValueError, match=rf"got '{name}', which Tokens .*: '[a-z0.]*body"):
            quiet(student, [(ids, labels)], term, teacher=teacher)
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_hooks_go_even_after_an_error(loader: Any) -> None:
    student, teacher = mlp(), mlp()

    def fail(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quiet(student, loader, distill.feature("1", "1", fail), teacher=teacher)
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_hooked_module_that_is_not_run_is_named(loader: Any) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = mlp(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(ValueError, match=r"layer: \['unused'\] did not run in forward"):
        quiet(Skips(), loader, distill.feature("unused", "1", mse), teacher=mlp())


def test_hooks_reach_through_wrappers(loader: Any) -> None:
    class Wrapper(nn.Module):
        """As torch.compile wraps."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, x: Tensor) -> Tensor:
            return self._orig_mod(x)

    for wrap in (Wrapper, nn.DataParallel, lambda m: Wrapper(nn.DataParallel(m))):
        student, teacher = mlp(4), mlp(16)
        term = distill.feature("1", "1", mse, projector=nn.Linear(4, 16))
        before = weights(student)
        quiet(wrap(student), loader, term, teacher=wrap(teacher))
        assert not equal(weights(student), before)


def test_several_layers_of_one_term(loader: Any) -> None:
    def fsp(a: Any, b: Any) -> Tensor:
        """Products between two layers (Yim et al. 2017), here of vectors."""
        (a1, a2), (b1, b2) = a, b
        return mse(a1.T @ a2 / len(a1), b1.T @ b2 / len(b1))

    term = distill.feature(("1", "3"), ("1", "3"), fsp)
    assert term.name == "fsp:1+3-1+3"
    steps = quiet(mlp(), loader, term, teacher=mlp(), epochs=20, lr=1e-2)
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_compiled_student_has_hooks(loader: Any) -> None:
    student, teacher = mlp(4), mlp(16)
    twin = copy.deepcopy(student)
    results = []
    for model in (twin, torch.compile(student, backend="eager")):
        torch.manual_seed(0)
        term = distill.feature("1", "1", mse, projector=nn.Linear(4, 16))
        steps = quiet(model, loader, [distill.hard(), term], teacher=teacher)
        results.append([step.loss for step in steps])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert equal(weights(student), weights(twin))
