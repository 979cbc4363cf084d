"""What people do with Lightning's callback by habit: it is right, or it is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd

lightning = pytest.importorskip("lightning")
from fastkd.integrations.lightning import Distillation  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Student(lightning.LightningModule):
    def __init__(self, distillation: Distillation, net: nn.Module) -> None:
        super().__init__()
        self.net, self.distillation = net, distillation

    def training_step(self, batch: Any, _: int) -> Tensor:
        inputs, labels, *stored = batch
        teacher = stored[0] if stored else None
        step = self.distillation.distillation_step
        return step(self.net(inputs), inputs, labels, teacher=teacher)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(student: Student, folder: Path, *more: Tensor, epochs: int = 3) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[student.distillation],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)), *more)
    trainer.fit(student, DataLoader(data, 4))
    return trainer


def watched(trunk: nn.Module) -> list[bool]:
    seen: list[bool] = []
    trunk.register_forward_pre_hook(lambda *_: seen.append(trunk.training))
    return seen


def trunk_and_two(frozen: bool = True) -> tuple[Any, Any, Any]:
    trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    trunk.requires_grad_(not frozen)
    return trunk, *(nn.Sequential(trunk, nn.Linear(8, 3)) for _ in range(2))


def test_shared_modules_keep_the_students_mode(tmp_path: Path) -> None:
    trunk, teacher, net = trunk_and_two()
    seen, before = watched(trunk[2]), trunk[1].num_batches_tracked.clone()
    fit(Student(Distillation(teacher), net), tmp_path)
    assert seen == [True, False] * 6
    assert trunk[1].num_batches_tracked - before == 6  # the student's forwards, no other


def test_shared_modules_in_a_loop_of_ones_own() -> None:
    trunk, teacher, net = trunk_and_two()
    distillation = Distillation(teacher)
    seen = watched(trunk[2])
    for _ in range(2):
        net.train()
        for _ in range(2):
            inputs = torch.randn(4, 4)
            distillation.distillation_step(net(inputs), inputs, torch.randint(3, (4,)))
    assert seen == [True, False] * 4


def test_a_shared_trunk_that_would_learn_is_refused(tmp_path: Path) -> None:
    _, teacher, net = trunk_and_two(frozen=False)
    with pytest.raises(ValueError, match=r"teacher: got 4 parameters of the student .*frozen"):
        fit(Student(Distillation(teacher), net), tmp_path)


def test_a_part_of_the_teacher_in_train_mode(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    before = teacher[1].running_mean.clone()

    class Switching(Student):
        def training_step(self, batch: Any, index: int) -> Tensor:
            teacher[1].train()
            return super().training_step(batch, index)

    fit(Switching(Distillation(teacher), nn.Linear(4, 3)), tmp_path)
    assert torch.equal(teacher[1].running_mean, before)
    assert not any(part.training for part in teacher.modules())
    loose = Distillation(teacher)  # nothing says who the student is
    teacher.train()
    inputs = torch.randn(4, 4)
    loose.distillation_step(torch.randn(4, 3), inputs, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(teacher[1].running_mean, before) and not teacher.training


def test_a_stored_teacher(tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(8, 4)
    teacher, nets = nn.Linear(4, 3), [nn.Linear(4, 3), nn.Linear(4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    said = teacher(inputs).detach()
    fit(Student(Distillation(teacher, alpha=0.3), nets[0]), tmp_path)
    fit(Student(Distillation(None, alpha=0.3), nets[1]), tmp_path, said)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)
    labels = torch.randint(3, (8,))
    topk = fastkd.topk_from_logits(said, 3, temperature=2.0)
    loss = Distillation(None).distillation_step(nets[0](inputs), inputs, labels, teacher=topk)
    torch.testing.assert_close(loss, fastkd.distillation_loss(nets[0](inputs), said, labels))


def test_one_teacher_and_no_other() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    both, neither = Distillation(nn.Linear(4, 3)), Distillation(None)
    with pytest.raises(ValueError, match="teacher: got a module and also"):
        both.distillation_step(logits, torch.randn(4, 4), labels, teacher=logits)
    with pytest.raises(ValueError, match="teacher: got neither a module nor"):
        neither.distillation_step(logits, torch.randn(4, 4), labels)


def test_a_teacher_that_is_not_read_is_named_once() -> None:
    distillation = Distillation(nn.Linear(4, 3), alpha=1.0)
    with pytest.warns(UserWarning, match="teacher: given, but with alpha=1") as caught:
        for _ in range(3):
            step = distillation.distillation_step
            step(torch.randn(4, 3), torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    assert len(caught) == 1
