"""Peers, chains, averages, generations, exits, curricula: each against its definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import equal, weights

from fastkd import distill
from fastkd.distill import Term

RATE = 0.1


def mlp(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4))


def data(steps: int = 3, rows: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Some rows without a label."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        labels = torch.randint(4, (rows,), generator=generator)
        labels[-2:] = -100
        batches.append((torch.randn(rows, 5, generator=generator), labels))
    return batches


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE)


def kl(teacher: Tensor, student: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL of softmaxes, mean over rows."""
    log_p, log_q = F.log_softmax(teacher / T, -1), F.log_softmax(student / T, -1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def move(model: nn.Module, loss: Tensor, rate: float = RATE) -> None:
    """A step of plain descent."""
    weights = list(model.parameters())
    for p, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        p.data -= rate * grad


def near(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()))


# ---- mutual


@pytest.mark.parametrize("count", [2, 3])
def test_peers_descend_on_the_mean_divergence_from_the_others(count: int) -> None:
    models = [mlp(at, 5 + at) for at in range(count)]
    twins, rates = copy.deepcopy(models), [1.0, 0.5, 0.25]
    steps = distill.mutual(
        models,
        data(),
        weight=0.7,
        temperature=2.0,
        optimizer=sgd,
        schedule=lambda step: rates[step],
        progress=False,
    )
    for (x, y), rate in zip(data(), rates, strict=True):
        logits = [twin(x) for twin in twins]
        for k, twin in enumerate(twins):  # the paper's: the mean of KLs, not KL from the mean
            others = [z.detach() for at, z in enumerate(logits) if at != k]
            apart = sum(kl(z, logits[k], 2.0) for z in others) / len(others)
            move(twin, F.cross_entropy(logits[k], y) + 0.7 * apart, rate * RATE)
    for model, twin in zip(models, twins, strict=True):
        near(model, twin)
    assert len(steps) == 3 and set(steps[0].terms) == {"hard", "mutual"}


def test_peers_keep_their_learning_rates() -> None:
    made = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made.append(sgd(model))
        return made[-1]

    def factor(step: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        distill.mutual(
            [mlp(0), mlp(1)], data(), optimizer=optimizer, schedule=factor, progress=False
        )
    assert [own.param_groups[0]["lr"] for own in made] == [RATE, RATE]


# ---- chains and generations


def test_each_of_a_chain_learns_from_the_one_before(tmp_path: Path) -> None:
    teacher, models = mlp(0, 9), [mlp(1, 7), mlp(2, 3)]
    before, twins = weights(teacher), copy.deepcopy(models)
    fresh, options = copy.deepcopy(models), {"weight": 0.6, "temperature": 3.0, "optimizer": sgd}
    steps = distill.assistant_chain(
        teacher, models, data(), checkpoint=tmp_path, progress=False, **options
    )
    assert equal(weights(teacher), before)
    above: nn.Module = teacher
    for twin in twins:
        for x, y in data():
            z, t = twin(x), above(x).detach()
            move(twin, F.cross_entropy(z, y) + 0.6 * kl(t, z, 3.0))
        above = twin
    for model, twin in zip(models, twins, strict=True):
        near(model, twin)
    assert [len(of) for of in steps] == [3, 3]
    # a resumed run finds both trained
    saved = distill.Checkpoints(tmp_path, resume=True)
    again = distill.assistant_chain(
        teacher, fresh, data(), checkpoint=saved, progress=False, **options
    )
    assert again == [[], []]
    assert all(equal(weights(a), weights(b)) for a, b in zip(fresh, models, strict=True))


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_generations_start_afresh_and_learn_from_the_last(kept: float) -> None:
    snapshots: list[tuple[int, dict[str, Tensor]]] = []
    made: list[nn.Module] = []

    def make(generation: int) -> nn.Module:
        if made:
            snapshots.append((generation - 1, weights(made[-1])))
        made.append(mlp(10 + generation))
        return made[-1]

    models = distill.born_again(
        make,
        data(),
        2,
        hard_weight=kept,
        weight=0.8,
        temperature=2.0,
        optimizer=sgd,
        progress=False,
    )
    assert [id(model) for model in models] == [id(model) for model in made] and len(models) == 3
    for at, then in snapshots:  # a teacher is as it was when its own training ended
        assert equal(weights(models[at]), then)
    above: nn.Module | None = None
    for at, model in enumerate(models):
        twin = mlp(10 + at)
        for x, y in data():
            z = twin(x)
            loss = F.cross_entropy(z, y)
            if above is not None:
                loss = kept * loss + 0.8 * kl(above(x).detach(), z, 2.0)
            move(twin, loss)
        near(model, twin)
        above = twin


# ---- the average


def test_the_student_learns_from_the_average_of_its_own_weights() -> None:
    student = mlp(0)
    twin, average = copy.deepcopy(student), copy.deepcopy(student)
    found, _ = distill.mean_teacher(
        student,
        data(4),
        decay=0.75,
        weight=2.0,
        ramp=2,
        temperature=1.5,
        optimizer=sgd(student),
        progress=False,
    )
    for step, (x, y) in enumerate(data(4)):
        z, grown = twin(x), math.exp(-5 * (1 - step / 2) ** 2) if step < 2 else 1.0
        apart = kl(average(x).detach(), z, 1.5)
        move(twin, F.cross_entropy(z, y) + 2.0 * grown * apart)
        with torch.no_grad():
            for a, b in zip(average.parameters(), twin.parameters(), strict=True):
                a.copy_(0.75 * a + 0.25 * b)
    near(student, twin)
    near(found, average)
    assert not any(p.requires_grad for p in found.parameters()) and not found.training


def test_the_average_sees_inputs_without_noise() -> None:
    class Seen(nn.Linear):
        inputs: ClassVar[dict[bool, Tensor]] = {}

        def forward(self, x: Tensor) -> Tensor:
            Seen.inputs[self.training] = x
            return super().forward(x)

    student, clean = Seen(5, 4), data(1)
    distill.mean_teacher(
        student, clean, transform=distill.input_noise(0.5), progress=False, weight=lambda _: 1.0
    )
    assert torch.equal(Seen.inputs[False], clean[0][0])
    assert not torch.equal(Seen.inputs[True], clean[0][0])


# ---- exits


def test_exits_learn_from_labels_and_the_last_layer() -> None:
    student, head = mlp(0), nn.Linear(6, 4)
    twin, other = copy.deepcopy(student), copy.deepcopy(head)
    exits = distill.self_distillation({"1": head}, weight=0.5, alpha=0.3, temperature=2.0)
    assert [term.name for term in exits] == ["exit:1", "own:1"]
    both = nn.ModuleList([student, head])
    distill.train(student, data(), [distill.hard(), *exits], optimizer=sgd(both), progress=False)
    for x, y in data():
        early = twin[1](twin[0](x))
        z, h = twin[2](early), other(early)
        exit_ = 0.7 * F.cross_entropy(h, y) + 0.3 * kl(z.detach(), h, 2.0)
        move(nn.ModuleList([twin, other]), F.cross_entropy(z, y) + 0.5 * exit_)
    near(student, twin)
    near(head, other)


def test_the_last_layer_does_not_learn_from_an_exit() -> None:
    student, head = mlp(0), nn.Linear(6, 4)
    before, early = weights(student), weights(head)
    exits = distill.self_distillation({"1": head}, alpha=1.0)
    assert [term.name for term in exits] == ["own:1"]
    distill.train(
        student, data(), exits, progress=False
    )  # the heads are found without an optimizer
    after = weights(student)
    assert all(torch.equal(after[name], before[name]) for name in ("2.weight", "2.bias"))
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(head.weight, early["weight"])
    control = distill.self_distillation({"0": head, "1": head}, alpha=0.0, weight=lambda step: step)
    assert [term.name for term in control] == ["exit:0", "exit:1"]
    assert callable(control[0].weight) and control[0].weight(3) == 3


# ---- curriculum


def test_temperatures_of_a_curriculum() -> None:
    cosine = distill.curriculum(20.0, 4.0, 10, warmup=2)
    assert [cosine(step) for step in (0, 2, 10, 99)] == [20.0, 20.0, 4.0, 4.0]
    assert cosine(6) == pytest.approx(12.0)
    linear = distill.curriculum(1.0, 5.0, 4, "linear")
    assert [linear(step) for step in range(6)] == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0]


def test_a_term_takes_each_steps_temperature() -> None:
    student, teacher = mlp(0), mlp(1)
    still = torch.optim.SGD(student.parameters(), lr=0.0)
    warmth = distill.curriculum(8.0, 2.0, 2, "linear")
    found = distill.train(
        student,
        data(),
        distill.soft(temperature=warmth),
        teacher=teacher,
        optimizer=still,
        progress=False,
    )
    for step, (x, _), T in zip(found, data(), (8.0, 5.0, 2.0), strict=True):
        assert step.loss == pytest.approx(kl(teacher(x), student(x), T).item(), rel=1e-3)


# ---- errors


class Learns(nn.Module):
    pass


def same(_: int) -> nn.Module:
    return SHARED


SHARED = mlp(0)
LEARNS = Term("scale", lambda s, t, b: s.logits.mean(), module=Learns())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: distill.mutual([mlp(0)], data()), "models: got 1, expected 2 or more"),
        (lambda: distill.mutual([SHARED, mlp(1), SHARED], data()), "models: .* 0 and 2 share"),
        (lambda: distill.mutual([mlp(0), mlp(1)], data(), LEARNS), "loss: .*'scale'.* learn"),
        (lambda: distill.assistant_chain(mlp(0), [], data()), "models: got 0, expected 1"),
        (lambda: distill.assistant_chain(SHARED, [SHARED], data()), "models: got the teacher"),
        (lambda: distill.born_again(same, data(), 1, progress=False), "make: .* 0 and 1 share"),
        (lambda: distill.born_again(same, data(), 0), "generations: got 0"),
        (lambda: distill.born_again(same, data(), hard_weight=-1.0), "hard_weight: got -1.0"),
        (lambda: distill.mean_teacher(mlp(0), data(), ramp=-1), "ramp: got -1"),
        (lambda: distill.mean_teacher(mlp(0), data(), decay=1.0), "decay: got 1.0"),
        (lambda: distill.self_distillation({}), "heads: got none"),
        (lambda: distill.self_distillation({"0": nn.Linear(2, 2)}, alpha=1.5), "alpha: got 1.5"),
        (
            lambda: distill.self_distillation({"0": nn.Linear(2, 2)}, temperature=0),
            "temperature: got 0",
        ),
        (lambda: distill.curriculum(0.0, 1.0, 5), "start: got 0.0"),
        (lambda: distill.curriculum(1.0, 1.0, 5, warmup=5), "warmup: got 5 of 5"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_a_plain_function_is_no_loss_of_several() -> None:
    with pytest.raises(TypeError, match="loss: got a plain function"):
        distill.mutual([mlp(0), mlp(1)], data(), lambda s, t, y: s.mean())  # type: ignore[arg-type]
