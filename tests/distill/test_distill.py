"""The bare loop: what it does step by step, what it leaves as it was, what it refuses."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_runs import Loader, equal, mlp, quiet, weights

import fastkd
from fastkd import distill
from fastkd.distill import trainer


def hard(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels)


def mixed(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return fastkd.distillation_loss(student, teacher, labels, temperature=4.0, alpha=0.3)


@pytest.fixture
def loader() -> Loader:
    """Three classes that a line can tell apart, in four batches."""
    inputs = torch.randn(64, 5)
    return list(zip(inputs.chunk(4), inputs[:, :3].argmax(-1).chunk(4), strict=True))


def test_student_learns_and_every_step_is_recorded(loader: Loader) -> None:
    student = mlp()
    before = distill.evaluate(student, loader)
    steps = quiet(student, loader, hard, epochs=20, lr=2e-2)
    after = distill.evaluate(student, loader)
    assert after.accuracy > 0.9 > before.accuracy
    assert after.cross_entropy < before.cross_entropy
    assert [s.step for s in steps] == list(range(80))
    assert [s.epoch for s in steps] == [i // 4 for i in range(80)]


def test_student_follows_its_teacher_without_labels(loader: Loader) -> None:
    teacher, student = mlp(), mlp()
    inputs = [batch for batch, _ in loader]  # a loader of inputs alone
    before = distill.agreement(student, teacher, inputs)
    quiet(
        student,
        inputs,
        lambda s, t, _: fastkd.distillation_loss(s, t, alpha=0.0),
        teacher=teacher,
        epochs=60,
        lr=2e-2,
    )
    assert distill.agreement(student, teacher, inputs) > max(0.9, before)


def test_loop_is_the_textbook_loop(loader: Loader) -> None:
    student, teacher = mlp(), mlp()
    twin = copy.deepcopy(student)
    steps = quiet(student, loader, mixed, teacher=teacher, clip_norm=0.1, lr=1e-2)

    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    losses = []
    for inputs, labels in loader:
        loss = mixed(twin(inputs), teacher(inputs).detach(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert equal(weights(student), weights(twin))
    assert [s.loss for s in steps] == losses


def test_two_runs_of_one_seed_have_the_same_bits(loader: Loader) -> None:
    def once() -> tuple[dict[str, Tensor], list[distill.Step]]:
        torch.manual_seed(3)
        student, teacher = mlp(dropout=0.2), mlp()
        steps = quiet(student, loader, mixed, teacher=teacher, epochs=5)
        return weights(student), steps

    (a, first), (b, second) = once(), once()
    assert equal(a, b)
    assert first == second


def test_schedule_scales_every_group_and_is_undone(loader: Loader) -> None:
    student = mlp()
    groups = [{"params": student[0].parameters(), "lr": 0.1}, {"params": student[3].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    seen = []
    steps = quiet(
        student,
        loader,
        hard,
        optimizer=optimizer,
        schedule=lambda step: 1 - step / 4,
        on_step=lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]),
    )
    assert seen == [[0.1 * f, 0.2 * f] for f in (1.0, 0.75, 0.5, 0.25)]
    assert [s.lr for s in steps] == [lr for lr, _ in seen]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]


def test_student_trains_in_train_mode_and_gets_its_mode_back(loader: Loader) -> None:
    student = mlp().eval()
    seen = []
    quiet(student, loader, hard, on_step=lambda *_: seen.append(student.training))
    assert all(seen) and not student.training


def test_on_step_sees_the_loss(loader: Loader) -> None:
    seen = []
    steps = quiet(
        mlp(), loader, hard, epochs=2, on_step=lambda e, i, loss: seen.append((e, i, float(loss)))
    )
    assert seen == [(s.epoch, s.step, s.loss) for s in steps]


def test_teacher_is_left_as_it_came(loader: Loader) -> None:
    teacher = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    teacher.train()
    teacher[1].eval()  # mixed modes are the user's business
    before, modes = weights(teacher), [m.training for m in teacher.modules()]
    given: list[Tensor] = []

    def loss(student: Tensor, soft: Tensor, labels: Tensor) -> Tensor:
        given.append(soft)
        assert not soft.requires_grad and not teacher.training and not teacher[2].training
        return mixed(student, soft, labels)

    # a hook that switches the teacher must not bring its dropout back
    quiet(mlp(), loader, loss, teacher=teacher, epochs=2, on_step=lambda *_: teacher.train())
    assert equal(weights(teacher), before)
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(given[:4], given[4:], strict=True))


def test_modes_and_rates_are_restored_after_an_error(loader: Loader) -> None:
    teacher, student = mlp().train(), mlp().eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)

    def loss(*_: Any) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quiet(
            student, loader, loss, teacher=teacher, optimizer=optimizer, schedule=lambda step: 0.1
        )
    assert teacher.training and not student.training
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_teacher_in_the_optimizer_is_refused(loader: Loader) -> None:
    teacher, student = mlp(), mlp()
    optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="optimizer: got 4 parameters of the teacher"):
        quiet(student, loader, mixed, teacher=teacher, optimizer=optimizer)
    with pytest.raises(ValueError, match="optimizer: got 4 parameters of the teacher"):
        quiet(student, loader, mixed, teacher=student)


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_with_its_step(
    loader: Loader, bad: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trainer.CHECK_EVERY, "cpu", every)  # above 1: as a GPU is served
    count = 0

    def loss(student: Tensor, teacher: None, labels: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return hard(student, teacher, labels) * (bad if count == 6 else 1.0)

    student = mlp()
    kept = {}
    with pytest.raises(FloatingPointError, match=rf"got {bad} at epoch 1, step 5 "):
        quiet(student, loader, loss, epochs=3, on_step=lambda *_: kept.update(weights(student)))
    if every == 1:
        assert equal(weights(student), kept)  # seen before the step was taken


@pytest.mark.parametrize("every", [1, 3, 50])
def test_records_do_not_depend_on_when_they_are_read(
    loader: Loader, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = mlp()
    twin = copy.deepcopy(student)
    expected = quiet(twin, loader, hard, epochs=2)
    monkeypatch.setitem(trainer.CHECK_EVERY, "cpu", every)
    assert quiet(student, loader, hard, epochs=2) == expected


@pytest.mark.parametrize("call", [lambda m: quiet(m, [], hard), lambda m: distill.evaluate(m, [])])
def test_empty_loader(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="loader: got no batch"):
        call(mlp())


def test_generator_is_empty_in_its_second_epoch(loader: Loader) -> None:
    with pytest.raises(ValueError, match="no batch in epoch 1; a generator lasts one pass only"):
        quiet(mlp(), iter(loader), hard, epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"clip_norm": math.nan}, "clip_norm: got nan"),
    ],
)
def test_arguments_out_of_range(loader: Loader, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(mlp(), loader, hard, **options)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, y: s.sum(-1),
        lambda s, t, y: hard(s, t, y).detach(),
        lambda s, t, y: hard(s, t, y).item(),
    ],
)
def test_loss_must_be_a_scalar_of_the_student(loader: Loader, loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss: got .* expected a 0-d tensor"):
        quiet(mlp(), loader, loss)


def test_batches_of_another_kind_are_refused() -> None:
    x, y = torch.randn(2, 5), torch.zeros(2, dtype=torch.long)
    for batch, kinds in (((x, y, y), "Tensor, Tensor, Tensor"), ({"x": x}, "dict of x")):
        with pytest.raises(TypeError, match=rf"loader: got a batch \({kinds}\)"):
            quiet(mlp(), [batch], hard)


def test_missing_extras_are_named(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tqdm.auto", "safetensors.torch", "safetensors"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"save needs safetensors.*\.\[train\]"):
        distill.save(mlp(), tmp_path / "m.safetensors")
    with pytest.raises(ImportError, match=r"load needs safetensors.*\.\[train\]"):
        distill.load(mlp(), tmp_path / "m.safetensors")
    quiet(mlp(), loader, hard)  # none of them is needed here
    assert list(tmp_path.iterdir()) == []
