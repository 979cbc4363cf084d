"""A frozen teacher in Lightning: off the optimizer, out of checkpoints, the loss of our own."""

from __future__ import annotations

import doctest
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
from fastkd.integrations import lightning as integration  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loader with few workers, of no logger
        yield


def _data() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (8,), generator=draw)
    labels[2] = -100
    return TensorDataset(torch.randn(8, 5, generator=draw), labels)


def _net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(5, 3)


def _teacher() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))


class Student(lightning.LightningModule):
    def __init__(self, distillation: integration.Distillation, **parts: nn.Module) -> None:
        super().__init__()
        self.net, self.distillation, self.others = _net(), distillation, nn.ModuleDict(parts)

    def training_step(self, batch: Any, _: int) -> Tensor:
        inputs, labels = batch
        return self.distillation.distillation_step(self.net(inputs), inputs, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(student: Student, folder: Path, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[student.distillation],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(student, DataLoader(_data(), 4))
    return trainer


def test_the_examples_run() -> None:
    found = doctest.testmod(integration)
    assert found.attempted > 10 and not found.failed


def test_a_fit_is_the_loop_written_out(tmp_path: Path) -> None:
    teacher, net = _teacher(), _net()
    student = Student(integration.Distillation(teacher, temperature=3.0, alpha=0.3))
    trainer = _fit(student, tmp_path)

    optimizer, frozen = torch.optim.SGD(net.parameters(), lr=0.1), _teacher().eval()
    for _ in range(2):
        for inputs, labels in DataLoader(_data(), 4):
            optimizer.zero_grad()
            said = frozen(inputs)
            loss = fastkd.distillation_loss(net(inputs), said, labels, temperature=3.0, alpha=0.3)
            loss.backward()
            optimizer.step()
    assert torch.equal(student.net.weight, net.weight)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    for one, other in zip(teacher.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(one, other)

    trainer.save_checkpoint(tmp_path / "all.ckpt")
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)
    assert sorted(saved["state_dict"]) == ["net.bias", "net.weight"]
    assert not any("Distillation" in name for name in saved["callbacks"])
    (state,) = saved["optimizer_states"]
    assert sum(len(group["params"]) for group in state["param_groups"]) == 2


def test_precision_and_options_of_a_step() -> None:
    teacher, inputs = _teacher(), torch.randn(4, 5)
    distillation = integration.Distillation(teacher, alpha=0.0)
    teacher.train()
    head = torch.randn(3, 6)
    hidden = torch.randn(4, 6)
    loss = distillation.distillation_step(
        fastkd.LinearLogits(hidden, head), inputs, temperature=1.5, divergence="js"
    )
    expected = fastkd.js_div(hidden @ head.t(), teacher(inputs), temperature=1.5) * 1.5**2
    torch.testing.assert_close(loss, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = distillation.distillation_step(fastkd.LinearLogits(hidden, head), {"input": inputs})
    assert low.dtype == torch.float32 and not teacher.training


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_teacher_keeps_its_dtype_under_the_trainers_precision(
    precision: Any, tmp_path: Path
) -> None:
    said: list[torch.dtype] = []
    distillation = integration.Distillation(_teacher(), alpha=0.5)
    distillation.teacher.register_forward_hook(lambda *given: said.append(given[-1].dtype))
    student = Student(distillation)
    before = student.net.weight.detach().double().clone()
    _fit(student, tmp_path, precision=precision)
    weight = student.net.weight.detach()
    assert weight.dtype == getattr(
        torch, {"bf16-true": "bfloat16", "64-true": "float64"}.get(precision, "float32")
    )
    assert all(p.dtype == torch.float32 for p in distillation.teacher.parameters())
    expected = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert said == [expected] * 4
    assert weight.isfinite().all() and not torch.equal(weight.double(), before)


# ---- bad input: before the first step


def test_a_teacher_within_the_student_is_refused(tmp_path: Path) -> None:
    teacher = _teacher()
    student = Student(integration.Distillation(teacher), theirs=teacher)
    with pytest.raises(ValueError, match=r"teacher: got 'others\.theirs', a part of the student"):
        _fit(student, tmp_path)


def test_a_teacher_in_train_mode_or_with_gradients_is_refused(tmp_path: Path) -> None:
    teacher = _teacher()
    student = Student(integration.Distillation(teacher))
    teacher[1].train()
    with pytest.raises(ValueError, match="teacher: got '1' of it in train mode"):
        _fit(student, tmp_path)
    teacher.eval()[0].weight.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher: got '0\.weight' that requires grad"):
        _fit(student, tmp_path)
    assert torch.equal(student.net.weight, _net().weight)


def test_a_teacher_in_an_optimizer_is_refused(tmp_path: Path) -> None:
    teacher = _teacher()

    class Both(Student):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *teacher.parameters()], lr=0.1)

    student = Both(integration.Distillation(teacher))
    with pytest.raises(ValueError, match="optimizer: got 2 parameters of the teacher"):
        _fit(student, tmp_path)
    assert torch.equal(student.net.weight, _net().weight)


@pytest.mark.parametrize("version", ["1.9.5", "3.0.0"])
def test_a_version_out_of_range_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration._lightning, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"lightning: got version {version}, expected 2\.x"):
        integration.Distillation(_teacher())


def test_a_teacher_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="teacher: got str, expected a module"):
        integration.Distillation("teacher")
