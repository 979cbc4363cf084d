"""Every family of students: the Trainer's curve is that of a loop in plain torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import family_models as models
import pytest
import torch
from causal_models import arguments, curve
from family_models import CASES, Case

from fastkd.integrations import transformers as ours
from fastkd.integrations.families import FAMILIES

T, ALPHA = 2.0, 0.3
LOSS = {"temperature": T, "alpha": ALPHA}
STEPS = {"max_steps": 10, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "train_sampling_strategy": "sequential"}


def name_of(student: Any) -> str | None:
    """The problem type, which has no temperature where it is regression."""
    one = student.config.problem_type is None and student.config.num_labels == 1
    return "regression" if one else student.config.problem_type


def trainer_of(folder: Path, case: Case, student: Any, teacher: Any, **options: Any) -> Any:
    args = arguments(folder, **PLAIN | options.pop("args", STEPS))
    loss = {"alpha": ALPHA} if name_of(student) == "regression" else LOSS
    options = {"loss": loss, "train_dataset": models.rows(case)} | options
    return ours.DistillationTrainer(student, args, teacher=teacher, **options)


def loop(case: Case, student: Any, teacher: Any) -> list[float]:
    """Ten steps of two micro-batches of two rows, in plain torch."""
    data, found = models.rows(case), []
    step = torch.optim.SGD(student.parameters(), lr=0.05)
    student.train()
    teacher.eval()
    for i in range(10):
        rows = data[4 * i % models.ROWS :][:4]
        batches = [models.stacked(rows[:2]), models.stacked(rows[2:])]
        total = models.count(case, batches)
        losses = [models.eager(case, student, teacher, b, total, T, ALPHA) for b in batches]
        sum(losses).backward()
        step.step()
        step.zero_grad()
        found.append(sum(float(loss.detach()) for loss in losses))
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name != "switch"])
def test_the_curve_is_that_of_a_loop(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    student, twin, teacher = (models.build(case, seed) for seed in (1, 1, 2))
    expected = loop(case, twin, teacher)
    trainer = trainer_of(tmp_path, case, student, teacher)
    assert trainer.distillation.linear is case.linear
    trainer.train()
    assert curve(trainer) == pytest.approx(expected, rel=2e-4)
    torch.testing.assert_close(student.state_dict(), twin.state_dict(), rtol=0, atol=2e-4)
    assert abs(expected[-1] - expected[0]) > 1e-2 * abs(expected[0])


@pytest.mark.filterwarnings("ignore:teacher. given")
@pytest.mark.parametrize("name", CASES)
def test_the_hard_loss_is_the_models_own(name: str, tmp_path: Path) -> None:
    """With alpha=1 and dense logits, the balance of experts and all."""
    case = CASES[name]
    student, teacher = models.build(case, 1).eval(), models.build(case, 2)
    batch: dict[str, Any] = models.stacked(models.rows(case))
    if name == "switch":  # an option of its forward, not of its config
        batch["output_router_logits"] = True
    trainer = trainer_of(tmp_path, case, student, teacher, loss={"alpha": 1.0}, linear=False)
    with torch.no_grad():
        own = student(**batch).loss
        torch.testing.assert_close(trainer.compute_loss(student, batch), own)


def test_each_family_is_tried() -> None:
    tried = {case.model for case in CASES.values()}
    for family in FAMILIES:
        assert any(model.endswith(family.classes) for model in tried), family.name


def test_the_page_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(ours.__file__).with_name("README.md").read_text()
    section = page.split("### What can be distilled")[1].split("### ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2  # type: ignore[attr-defined]
