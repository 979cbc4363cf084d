"""Inputs without data: the batch-norm distance, inversion, a generator; the teacher stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.recipes.data_free import batch_norm_prior, invert, train_generator


def taught() -> nn.Sequential:
    """A teacher with statistics of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    for _ in range(20):
        model(torch.randn(50, 1, 4, 4))
    return model


def test_the_prior_is_the_distance_of_the_statistics() -> None:
    teacher, x = taught().eval(), 2 * torch.randn(7, 1, 4, 4) + 1
    with batch_norm_prior(teacher) as distance:
        teacher(x)
        found = distance()
    expected = torch.zeros(())
    h = teacher[0](x)
    for norm, seen, dims in (
        (teacher[1], h, (0, 2, 3)),
        (teacher[5], teacher[:5](x), (0,)),
    ):
        mean = seen.mean(dims)
        var = seen.pow(2).mean(dims) - mean.pow(2)
        expected = expected + (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(part._forward_pre_hooks for part in teacher.modules())


def test_inversion_lowers_what_it_says_and_touches_nothing_else() -> None:
    teacher = taught().train()
    teacher[1].eval()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    labels = torch.arange(3).repeat(8)

    def objective(x: Tensor) -> float:
        frozen = copy.deepcopy(teacher).eval()
        with torch.no_grad(), batch_norm_prior(frozen) as distance:
            return (F.cross_entropy(frozen(x), labels) + distance()).item()

    values = []
    for steps in (1, 60):
        torch.manual_seed(1)
        made = invert(teacher, labels, (1, 4, 4), steps=steps, bounds=(-3.0, 3.0))
        assert made.shape == (24, 1, 4, 4) and made.abs().max() <= 3 and not made.requires_grad
        values.append(objective(made))
    assert values[1] < 0.7 * values[0]
    assert all(torch.equal(before[key], now) for key, now in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())


def test_a_generator_learns_to_give_every_class() -> None:
    teacher = taught()
    with torch.no_grad():
        teacher[7].weight.mul_(10)  # sure of some inputs
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(2)
    generator = nn.Sequential(nn.Linear(5, 16), nn.Unflatten(1, (1, 4, 4))).eval()
    z = torch.randn(200, 5)

    def measured() -> tuple[float, float]:
        """Entropy of the mean answer, and mean entropy of the answers."""
        with torch.no_grad():
            p = copy.deepcopy(teacher).eval()(generator(z)).softmax(-1)
        entropy = torch.special.entr
        return entropy(p.mean(0)).sum().item(), entropy(p).sum(-1).mean().item()

    (_, unsure), options = measured(), {"steps": 150, "lr": 1e-2, "prior": 0.0}
    train_generator(generator, teacher, lambda: torch.randn(64, 5), **options)
    even, sure = measured()
    assert even > 1.0 and sure < 0.5 * unsure  # at most log 3 = 1.0986
    assert not generator.training
    assert all(torch.equal(before[key], now) for key, now in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_errors() -> None:
    labels, plain = torch.arange(2), nn.Linear(4, 2)
    with pytest.raises(ValueError, match="teacher: got no batch norm"):
        invert(plain, labels, (4,), steps=1)
    assert invert(plain, labels, (4,), steps=1, prior=0.0).shape == (2, 4)
    with pytest.raises(ValueError, match="steps: got 0"):
        invert(plain, labels, (4,), steps=0)
    with pytest.raises(ValueError, match=r"bounds: got \(1, 0\)"):
        invert(plain, labels, (4,), bounds=(1, 0))
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 1\)"):
        invert(plain, labels[:, None], (4,), steps=1)
    with pytest.raises(ValueError, match="steps: got 0"):
        train_generator(plain, plain, lambda: torch.randn(1, 4), steps=0)
